// The distinct tokens of one sequence, for penalties: which occur in its prompt, and how often each
// occurs in its output.

#pragma once

#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

namespace s1::cpu {

class TokenCounts {
 public:
  struct Entry {
    int32_t token;
    int32_t count;  // in the output
    bool in_prompt;

    bool occurs() const { return in_prompt || count > 0; }
  };

  // Of a sequence whose first `prompt_len` tokens are its prompt.
  TokenCounts(std::span<const int32_t> tokens, int32_t prompt_len) {
    for (size_t i = 0; i < tokens.size(); ++i) {
      Entry& entry = find(tokens[i]);
      if (i < static_cast<size_t>(prompt_len)) {
        entry.in_prompt = true;
      } else {
        ++entry.count;
      }
    }
  }

  // Counts a token of the output; `change` -1: it was dropped again.
  void add(int32_t token, int32_t change) { find(token).count += change; }

  // One per distinct token so far, dropped ones included.
  const std::vector<Entry>& entries() const { return entries_; }

 private:
  Entry& find(int32_t token) {
    const auto [place, is_new] = places_.try_emplace(token, entries_.size());
    if (is_new) entries_.push_back({token, 0, false});
    return entries_[place->second];
  }

  std::vector<Entry> entries_;
  std::unordered_map<int32_t, size_t> places_;
};

}  // namespace s1::cpu
