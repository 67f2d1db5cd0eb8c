#include "end_matcher.hpp"

#include <algorithm>
#include <array>

namespace s1 {

namespace {

// One state of the automaton over bytes.
struct Node {
  std::array<int16_t, 256> child{};  // 0: none; after linking: the next state
  int16_t fallback = 0;              // state of the longest proper end that begins a marker
  int32_t depth = 0;
  int32_t marker_len = 0;  // of the longest marker that ends here; 0: none
};

void check(const std::string& marker) {
  if (marker.empty()) throw std::invalid_argument("end_markers: a marker is empty");
  if (marker.size() > EndMatcher::kMaxMarker) {
    throw std::invalid_argument("end_markers: \"" + marker + "\" has more than " +
                                std::to_string(EndMatcher::kMaxMarker) + " bytes");
  }
  if (marker.find('\n') != std::string::npos) {
    throw std::invalid_argument("end_markers: a marker must not hold a newline");
  }
}

std::vector<Node> make_trie(const std::vector<std::string>& markers) {
  std::vector<Node> nodes(1);
  for (const std::string& marker : markers) {
    check(marker);
    size_t at = 0;
    for (const char c : marker) {
      const auto byte = static_cast<uint8_t>(c);
      if (nodes[at].child[byte] == 0) {
        nodes[at].child[byte] = static_cast<int16_t>(nodes.size());
        nodes.push_back({.depth = nodes[at].depth + 1});
      }
      at = static_cast<size_t>(nodes[at].child[byte]);
    }
    nodes[at].marker_len = static_cast<int32_t>(marker.size());
  }
  if (nodes.size() > EndMatcher::kMaxStates) {
    throw std::invalid_argument("end_markers: all markers together have more than " +
                                std::to_string(EndMatcher::kMaxStates - 1) + " bytes");
  }
  return nodes;
}

// Completes the transitions, nearest states first: a missing child is that of the fallback.
void link(std::vector<Node>& nodes) {
  std::vector<size_t> order = {0};
  for (size_t i = 0; i < order.size(); ++i) {
    const size_t at = order[i];
    const auto fallback = static_cast<size_t>(nodes[at].fallback);
    if (nodes[at].marker_len == 0) nodes[at].marker_len = nodes[fallback].marker_len;
    for (size_t byte = 0; byte < 256; ++byte) {
      const int16_t below = at == 0 ? int16_t{0} : nodes[fallback].child[byte];
      const int16_t child = nodes[at].child[byte];
      if (child == 0) {
        nodes[at].child[byte] = below;
      } else {
        nodes[static_cast<size_t>(child)].fallback = below;
        order.push_back(static_cast<size_t>(child));
      }
    }
  }
}

uint8_t advance(const std::vector<Node>& nodes, size_t state, const std::string& bytes) {
  int32_t num_read = 0;
  for (const char c : bytes) {
    state = static_cast<size_t>(nodes[state].child[static_cast<uint8_t>(c)]);
    ++num_read;
    if (nodes[state].marker_len > 0) {
      const int32_t before = std::max(nodes[state].marker_len - num_read, 0);
      return static_cast<uint8_t>(EndMatcher::kComplete + before);
    }
  }
  return bytes.empty() ? uint8_t{0} : static_cast<uint8_t>(state);
}

}  // namespace

EndMatcher::EndMatcher(const std::vector<std::string>& markers,
                       const std::vector<std::string>& token_bytes) {
  if (markers.empty()) return;
  std::vector<Node> nodes = make_trie(markers);
  link(nodes);
  for (const Node& node : nodes) depths_.push_back(node.depth);
  for (const std::string& bytes : token_bytes) {
    token_lens_.push_back(static_cast<uint8_t>(std::clamp<size_t>(bytes.size(), 1, 31)));
  }
  table_.reserve(nodes.size() * token_bytes.size());
  for (size_t state = 0; state < nodes.size(); ++state) {
    for (const std::string& bytes : token_bytes) table_.push_back(advance(nodes, state, bytes));
  }
}

}  // namespace s1
