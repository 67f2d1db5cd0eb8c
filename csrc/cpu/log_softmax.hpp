// Log-probabilities of the tokens of one row of logits, before any rule.

#pragma once

#include <cstdint>

namespace s1::cpu {

// A view of a sanitized copy of the row in memory of this thread, valid until the thread makes the
// next one.
class LogSoftmax {
 public:
  LogSoftmax(const float* logits, int64_t size);

  float of(int64_t token) const;

  // 1 and the number of tokens before it in the order of top().
  int32_t rank(int64_t token) const;

  // The `count` likeliest tokens, at most `size`, and their log-probabilities, in descending order;
  // equal ones by ascending id.
  void top(int64_t count, int32_t* tokens, float* logprobs) const;

 private:
  const float* logits_;
  const float* maxima_;  // of every kScanBatch logits
  int64_t size_;
  int64_t num_maxima_;
  float peak_;
  double log_sum_;  // log of the sum of e^(logit - peak)
};

// Scores n rows of `size` logits by one token each; memory of the caller.
struct ScoredRows {
  const float* logits;  // [n, stride]
  int64_t count;        // n
  int64_t stride;
  int64_t size;           // of the vocabulary
  const int64_t* tokens;  // [n]; one outside the vocabulary has probability 0 and the last rank
  int64_t width;          // k, at most `size`
  float* logprobs;        // [n]
  int32_t* ranks;         // [n]
  float* top;             // [n, k]
  int32_t* top_tokens;    // [n, k]
};
void score_rows(const ScoredRows& rows);

}  // namespace s1::cpu
