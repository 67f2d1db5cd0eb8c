// Samples the rows of a step from the sampling state of the persistent batch, without Python.
//
// A running sequence has a row of state, by req_index: parameters, which the caller owns and
// writes, a logit bias, and the tokens that occurred if it has penalties. A step may sample one
// sequence several times (after draft tokens) and others not at all. The rules of a row cost what
// they name: ids of a bias, tokens that occurred. s1engine/ops/torch_sampling.py defines them.
//
// Not thread-safe: one thread steps. sample() uses the thread pool.

#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "token_counts.hpp"

namespace s1::cpu {

// Parameters by req_index; arrays of the caller.
struct SamplingColumns {
  const float* temperature;
  const int32_t* top_k;
  const float* top_p;
  const float* min_p;
  const int64_t* seeds;
  const float* penalties;       // repetition, presence, frequency of each row
  const int32_t* num_logprobs;  // likeliest tokens to report; -1: no log-probabilities at all
};

// Log-probabilities of n rows before any rule; memory of the caller. Written only in rows that
// want them.
struct SampledLogprobs {
  int64_t width;        // k, max_logprobs() of the rows
  float* chosen;        // [n] of the sampled token
  float* top;           // [n, k] of the likeliest ones, descending
  int32_t* top_tokens;  // [n, k]
};

// Ban code of a row whose own ends are banned.
inline constexpr uint8_t kBanRowEnds = 255;

// The rows that a step samples; arrays of the caller.
struct SampledRows {
  float* logits;     // [n, stride] of which the vocabulary is used; overwritten
  const float* raw;  // [n, stride] for log-probabilities; may be `logits`
  int64_t stride;
  int64_t count;               // n
  const int32_t* req_indices;  // [n]
  const int64_t* positions;    // [n] of the token to sample, in its sequence
  const uint8_t* banned;       // [n] ban codes of csrc/core/budget.hpp; null: bans nothing
  const uint8_t* const* allowed = nullptr;  // [n] bitmask of a grammar, null: all; or null
};

class Sampler {
 public:
  struct TokenBias {
    int32_t token;
    float value;
  };

  // `banned_ids`: the ids that each ban code forbids, from code 1 on.
  Sampler(const SamplingColumns& columns, int32_t num_rows, int64_t vocab_size,
          std::vector<std::vector<int32_t>> banned_ids);

  // Sets the row of a sequence that enters the persistent batch. `tokens`: prompt and output so far
  // if it has penalties, else empty. `ends`: the ids that kBanRowEnds forbids.
  void add_row(int32_t req_index, std::vector<TokenBias> bias, std::span<const int32_t> tokens,
               int32_t prompt_len, std::vector<int32_t> ends = {});

  // Counts tokens that steps have appended; ~token: dropped again. Rows without penalties ignore
  // theirs.
  void count_appended(std::span<const int32_t> req_indices, std::span<const int32_t> tokens);

  int64_t vocab_size() const { return vocab_size_; }

  // Likeliest tokens that a row reports, at most the vocabulary; -1: no log-probabilities at all.
  int32_t num_logprobs(int32_t req_index) const {
    return static_cast<int32_t>(std::min<int64_t>(columns_.num_logprobs[req_index], vocab_size_));
  }
  // The largest num_logprobs of these rows; -1: none wants any.
  int64_t max_logprobs(std::span<const int32_t> req_indices) const;

  // Writes a token [n] for each row, and log-probabilities if `logprobs` is not null.
  void sample(const SampledRows& rows, int64_t* tokens,
              const SampledLogprobs* logprobs = nullptr) const;

 private:
  struct RowRules {
    std::vector<TokenBias> bias;
    std::vector<int32_t> ends;          // banned by kBanRowEnds
    std::optional<TokenCounts> counts;  // only with penalties
  };

  bool in_vocabulary(int32_t token) const { return token >= 0 && token < vocab_size_; }
  int64_t sample_row(const SampledRows& rows, int64_t i) const;
  int64_t sample_with_logprobs(const SampledRows& rows, int64_t i,
                               const SampledLogprobs& out) const;
  void penalize(float* logits, int32_t req_index) const;

  SamplingColumns columns_;
  int64_t vocab_size_;
  std::vector<std::vector<int32_t>> banned_ids_;
  std::vector<RowRules> rows_;
};

}  // namespace s1::cpu
