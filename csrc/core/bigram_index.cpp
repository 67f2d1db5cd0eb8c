#include "bigram_index.hpp"

#include <algorithm>

namespace s1 {

namespace {

uint64_t bigram_before(std::span<const TokenId> tokens, size_t end) {
  return static_cast<uint64_t>(static_cast<uint32_t>(tokens[end - 2])) << 32 |
         static_cast<uint32_t>(tokens[end - 1]);
}

}  // namespace

// Index of the bigram's entry, or of the empty entry where it belongs.
size_t BigramIndex::find(uint64_t bigram) const {
  const size_t mask = entries_.size() - 1;
  size_t at = (bigram * 0x9e3779b97f4a7c15ULL) >> 32 & mask;
  while (entries_[at].latest != 0 && entries_[at].bigram != bigram) at = (at + 1) & mask;
  return at;
}

void BigramIndex::double_capacity() {
  std::vector<Entry> old(std::max<size_t>(256, 2 * entries_.size()));
  old.swap(entries_);
  for (const Entry& entry : old) {
    if (entry.latest != 0) entries_[find(entry.bigram)] = entry;
  }
}

void BigramIndex::grow(std::span<const TokenId> tokens) {
  for (size_t end = previous_.size(); end < tokens.size(); ++end) {
    previous_.push_back(0);
    if (end < 2) continue;
    if (2 * (num_bigrams_ + 1) > entries_.size()) double_capacity();
    const uint64_t bigram = bigram_before(tokens, end);
    Entry& entry = entries_[find(bigram)];
    num_bigrams_ += entry.latest == 0;
    previous_.back() = entry.latest;
    entry = {bigram, static_cast<int32_t>(end)};
  }
}

int32_t BigramIndex::latest(std::span<const TokenId> tokens) const {
  if (tokens.size() < 2 || entries_.empty()) return 0;
  return entries_[find(bigram_before(tokens, tokens.size()))].latest;
}

}  // namespace s1
