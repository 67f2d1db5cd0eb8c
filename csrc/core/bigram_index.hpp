// Where each bigram of a growing token list occurred: a hash table and a linked list per bigram.

#pragma once

#include <span>
#include <vector>

#include "types.hpp"

namespace s1 {

// Positions are those directly after an occurrence; 0 means that there is none.
class BigramIndex {
 public:
  // Indexes `tokens` except for the bigram at the end: what follows it is not known yet.
  void grow(std::span<const TokenId> tokens);

  // Latest occurrence of the last bigram of `tokens`.
  int32_t latest(std::span<const TokenId> tokens) const;

  // The occurrence of the same bigram before the one at `position`.
  int32_t previous(int32_t position) const { return previous_[static_cast<size_t>(position)]; }

 private:
  struct Entry {
    uint64_t bigram = 0;
    int32_t latest = 0;
  };

  size_t find(uint64_t bigram) const;
  void double_capacity();

  std::vector<Entry> entries_;     // open addressing; a power of two, at most half full
  std::vector<int32_t> previous_;  // by position
  size_t num_bigrams_ = 0;
};

}  // namespace s1
