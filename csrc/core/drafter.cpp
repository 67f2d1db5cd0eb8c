#include "drafter.hpp"

#include <algorithm>

namespace s1 {

namespace {

// Of 1,000 guesses so many were right, on 159 traces of QwQ-32B. Rows: matches of 2, 3, 4, 5 to 6,
// 7 to 9, 10 to 15, 16 tokens. Columns: a single place; all agree; over 3/5 agree; fewer.
constexpr std::array<int32_t, AcceptanceStats::kLevels> kMeasured = {416, 750, 518, 254,  //
                                                                     492, 773, 513, 282,  //
                                                                     548, 788, 537, 299,  //
                                                                     597, 814, 546, 330,  //
                                                                     675, 864, 582, 370,  //
                                                                     748, 895, 632, 412,  //
                                                                     850, 965, 683, 454};

// The measured shares count as so many guesses; beyond kMemory the older ones fade.
constexpr double kWeight = 16.0;
constexpr double kMemory = 256.0;

int32_t level_of(int32_t match, int32_t votes, int32_t places) {
  constexpr std::array<int32_t, 6> kRows = {3, 4, 5, 7, 10, 16};  // first match of rows 1 to 6
  const auto row = std::upper_bound(kRows.begin(), kRows.end(), match) - kRows.begin();
  const int32_t column = places == 1 ? 0 : votes == places ? 1 : 5 * votes > 3 * places ? 2 : 3;
  return 4 * static_cast<int32_t>(row) + column;
}

uint64_t pair_before(std::span<const TokenId> tokens, size_t end) {
  return static_cast<uint64_t>(static_cast<uint32_t>(tokens[end - 2])) << 32 |
         static_cast<uint32_t>(tokens[end - 1]);
}

// Places that vote, and how many tokens before them are those at the end of the sequence.
struct Places {
  std::array<int32_t, Drafter::kMaxPlaces> positions;
  int32_t count = 0;
  int32_t match = 0;
};

int32_t match_at(std::span<const TokenId> tokens, int32_t position) {
  const TokenId* here = tokens.data() + position;
  const TokenId* end = tokens.data() + tokens.size();
  const int32_t most = std::min(position, Drafter::kMaxMatch);
  int32_t match = Drafter::kMinMatch;
  while (match < most && here[-1 - match] == end[-1 - match]) ++match;
  return match;
}

Places find_places(std::span<const TokenId> tokens, const PairIndex& index) {
  Places places;
  int32_t position = index.latest(tokens, tokens.size());
  for (int32_t i = 0; i < Drafter::kMaxPlaces && position != 0; ++i) {
    const int32_t match = match_at(tokens, position);
    if (match > places.match) {
      places.match = match;
      places.count = 0;
    }
    if (match == places.match) places.positions[static_cast<size_t>(places.count++)] = position;
    position = index.before(position);
  }
  return places;
}

// Leaves the places that voted for the winner, which is returned with the number of its votes.
template <typename TokenAt>
std::pair<TokenId, int32_t> vote(Places& places, const TokenAt& token_at) {
  std::array<TokenId, Drafter::kMaxPlaces> tokens;
  const auto count = static_cast<size_t>(places.count);
  for (size_t i = 0; i < count; ++i) tokens[i] = token_at(places.positions[i]);
  const auto voters = std::span(tokens).first(count);
  TokenId winner = voters[0];
  auto votes = std::count(voters.begin(), voters.end(), winner);
  for (size_t i = 1; i < count && 2 * static_cast<size_t>(votes) < count; ++i) {
    const auto own = std::count(voters.begin(), voters.end(), voters[i]);
    if (own > votes) {
      winner = voters[i];
      votes = own;
    }
  }
  size_t kept = 0;
  for (size_t i = 0; i < count; ++i) {
    if (tokens[i] == winner) places.positions[kept++] = places.positions[i];
  }
  places.count = static_cast<int32_t>(kept);
  return {winner, static_cast<int32_t>(votes)};
}

}  // namespace

/* === the index === */

// Where in the table a pair stands, or would.
size_t PairIndex::find(uint64_t pair) const {
  const size_t mask = entries_.size() - 1;
  size_t at = (pair * 0x9e3779b97f4a7c15ULL) >> 32 & mask;
  while (entries_[at].latest != 0 && entries_[at].pair != pair) at = (at + 1) & mask;
  return at;
}

void PairIndex::widen() {
  std::vector<Entry> old(std::max<size_t>(256, 2 * entries_.size()));
  old.swap(entries_);
  for (const Entry& entry : old) {
    if (entry.latest != 0) entries_[find(entry.pair)] = entry;
  }
}

void PairIndex::grow(std::span<const TokenId> tokens) {
  for (size_t end = before_.size(); end < tokens.size(); ++end) {
    before_.push_back(0);
    if (end < 2) continue;
    if (2 * (num_pairs_ + 1) > entries_.size()) widen();
    const uint64_t pair = pair_before(tokens, end);
    Entry& entry = entries_[find(pair)];
    num_pairs_ += entry.latest == 0;
    before_.back() = entry.latest;
    entry = {pair, static_cast<int32_t>(end)};
  }
}

int32_t PairIndex::latest(std::span<const TokenId> tokens, size_t end) const {
  if (end < 2 || entries_.empty()) return 0;
  return entries_[find(pair_before(tokens, end))].latest;
}

/* === guesses === */

AcceptanceStats::AcceptanceStats() {
  for (size_t level = 0; level < counts_.size(); ++level) {
    counts_[level] = {kWeight, kWeight * kMeasured[level] / 1000};
  }
}

double AcceptanceStats::chance(int32_t level) const {
  const Count& count = counts_[static_cast<size_t>(level)];
  return count.right / count.tried;
}

void AcceptanceStats::learn(int32_t level, bool right) {
  Count& count = counts_[static_cast<size_t>(level)];
  ++count.tried;
  count.right += right;
  if (count.tried < kMemory) return;
  count.tried /= 2;
  count.right /= 2;
}

AcceptanceStats AcceptanceStats::as_prior() const {
  AcceptanceStats prior;
  for (int32_t level = 0; level < kLevels; ++level) {
    prior.counts_[static_cast<size_t>(level)] = {kWeight, std::max(kWeight * chance(level), 1.0)};
  }
  return prior;
}

int32_t Drafter::propose(std::span<const TokenId> tokens, int32_t limit, double least,
                         std::vector<DraftToken>& guesses) {
  index_.grow(tokens);
  Places places = find_places(tokens, index_);
  if (places.count == 0) return 0;
  const size_t first = guesses.size();
  double chance = 1.0;
  for (int32_t i = 0; i < limit; ++i) {
    const auto token_at = [&](int32_t position) {
      const auto at = static_cast<size_t>(position + i);
      return at < tokens.size() ? tokens[at] : guesses[first + at - tokens.size()].token;
    };
    const int32_t voters = places.count;
    const auto [token, votes] = vote(places, token_at);
    const int32_t level = level_of(places.match + i, votes, voters);
    chance *= record_.chance(level);
    if (chance < least) break;
    guesses.push_back({token, level, chance});
  }
  return static_cast<int32_t>(guesses.size() - first);
}

}  // namespace s1
