// Finds texts that end the thinking and are no single token: end markers, as bytes over tokens.
//
// How a marker is cut into tokens depends on the text around it (`.</` `think` `>\n\n`), so ids are
// not compared. An automaton over the markers' bytes (Aho-Corasick) is advanced by whole tokens
// instead, through a table that is computed once per model: next[state][token]. State 0: no end of
// the text begins a marker. Any other state: the last depth(state) bytes do, the longest such end.
//
// Which tokens hold these bytes follows from `TokenStarts`, a bit set. Knows bytes of tokens only:
// what a marker means is decided in budget.hpp.

#pragma once

#include <bit>
#include <string>
#include <vector>

#include "types.hpp"

namespace s1 {

// Where the latest tokens start: bit i is set if a token starts i bytes before the last byte.
using TokenStarts = uint32_t;

class EndMatcher {
 public:
  static constexpr size_t kMaxMarker = 32;   // bytes of one marker
  static constexpr size_t kMaxStates = 128;  // bytes of all markers, and one
  // Entries of the table from here on: a marker is complete, and (entry - kComplete) of its bytes
  // stand before the token.
  static constexpr uint8_t kComplete = 128;

  // No markers: nothing is ever found.
  EndMatcher() = default;

  // `token_bytes`: text of each token id; a token without text ends every match. Throws
  // std::invalid_argument if a marker is empty, too long or holds a newline, or if all together
  // have too many bytes.
  EndMatcher(const std::vector<std::string>& markers, const std::vector<std::string>& token_bytes);

  bool empty() const { return depths_.empty(); }
  int32_t num_states() const { return static_cast<int32_t>(depths_.size()); }
  int32_t vocab_size() const { return static_cast<int32_t>(token_lens_.size()); }

  // The next state, or an entry from kComplete on. 0 for an unknown token.
  uint8_t next(int32_t state, TokenId token) const {
    if (empty() || token < 0 || token >= vocab_size()) return 0;
    return table_[static_cast<size_t>(state) * token_lens_.size() + static_cast<size_t>(token)];
  }

  // Bytes of a marker that a state has matched.
  int32_t depth(int32_t state) const { return depths_[static_cast<size_t>(state)]; }

  // `starts` after one more token.
  TokenStarts append(TokenStarts starts, TokenId token) const {
    const int32_t len = token_lens_[static_cast<size_t>(token)];
    return (starts << len | TokenStarts{1} << (len - 1)) & kStartsMask;
  }

  // Number of tokens that hold the last `num_bytes` bytes, fewer than kMaxMarker.
  static int32_t count_tokens(TokenStarts starts, int32_t num_bytes) {
    if (num_bytes == 0) return 0;
    const TokenStarts inside = (TokenStarts{1} << (num_bytes - 1)) - 1;
    return std::popcount(starts & inside) + 1;
  }

  // For the device: [num_states, vocab], [num_states], and [vocab] bytes of a token, 1 to 31.
  const std::vector<uint8_t>& table() const { return table_; }
  const std::vector<int32_t>& depths() const { return depths_; }
  const std::vector<uint8_t>& token_lens() const { return token_lens_; }

 private:
  static constexpr TokenStarts kStartsMask = 0x7fffffff;

  std::vector<uint8_t> table_;
  std::vector<int32_t> depths_;
  std::vector<uint8_t> token_lens_;
};

}  // namespace s1
