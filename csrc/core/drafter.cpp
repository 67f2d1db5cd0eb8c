#include "drafter.hpp"

#include <algorithm>
#include <array>

namespace s1 {

namespace {

// Occurrences that vote, all with a match of `match_len` tokens.
struct Voters {
  std::array<int32_t, Drafter::kMaxOccurrences> positions{};  // after the match
  int32_t count = 0;
  int32_t match_len = 0;
};

int32_t match_len_at(std::span<const TokenId> tokens, int32_t position) {
  const TokenId* here = tokens.data() + position;
  const TokenId* end = tokens.data() + tokens.size();
  const int32_t limit = std::min(position, Drafter::kMaxMatch);
  int32_t match_len = Drafter::kMinMatch;
  while (match_len < limit && here[-1 - match_len] == end[-1 - match_len]) ++match_len;
  return match_len;
}

Voters find_voters(std::span<const TokenId> tokens, const BigramIndex& index) {
  Voters voters;
  int32_t position = index.latest(tokens);
  for (int32_t i = 0; i < Drafter::kMaxOccurrences && position != 0; ++i) {
    const int32_t match_len = match_len_at(tokens, position);
    if (match_len > voters.match_len) {
      voters.match_len = match_len;
      voters.count = 0;
    }
    if (match_len == voters.match_len) {
      voters.positions[static_cast<size_t>(voters.count++)] = position;
    }
    position = index.previous(position);
  }
  return voters;
}

// Returns the winner and the number of its votes; its voters are left.
template <typename TokenAt>
std::pair<TokenId, int32_t> vote(Voters& voters, const TokenAt& token_at) {
  std::array<TokenId, Drafter::kMaxOccurrences> tokens{};
  const auto count = static_cast<size_t>(voters.count);
  for (size_t i = 0; i < count; ++i) tokens[i] = token_at(voters.positions[i]);
  const auto cast = std::span(tokens).first(count);
  TokenId winner = cast[0];
  auto votes = std::count(cast.begin(), cast.end(), winner);
  for (size_t i = 1; i < count && 2 * static_cast<size_t>(votes) < count; ++i) {
    const auto own = std::count(cast.begin(), cast.end(), cast[i]);
    if (own > votes) {
      winner = cast[i];
      votes = own;
    }
  }
  size_t kept = 0;
  for (size_t i = 0; i < count; ++i) {
    if (tokens[i] == winner) voters.positions[kept++] = voters.positions[i];
  }
  voters.count = static_cast<int32_t>(kept);
  return {winner, static_cast<int32_t>(votes)};
}

}  // namespace

int32_t Drafter::propose(std::span<const TokenId> tokens, int32_t num_settled, int32_t limit,
                         double min_probability, std::vector<DraftToken>& draft) {
  index_.grow(tokens.first(static_cast<size_t>(num_settled)));
  Voters voters = find_voters(tokens, index_);
  if (voters.count == 0) return 0;
  const size_t first = draft.size();
  double probability = 1.0;
  for (int32_t i = 0; i < limit; ++i) {
    const auto token_at = [&](int32_t position) {
      const auto at = static_cast<size_t>(position + i);
      return at < tokens.size() ? tokens[at] : draft[first + at - tokens.size()].token;
    };
    const int32_t num_voters = voters.count;
    const auto [token, votes] = vote(voters, token_at);
    const int32_t bucket = AcceptanceStats::bucket_of(voters.match_len + i, votes, num_voters);
    probability *= stats_.probability(bucket);
    if (probability < min_probability) break;
    draft.push_back({token, bucket, probability});
  }
  return static_cast<int32_t>(draft.size() - first);
}

}  // namespace s1
