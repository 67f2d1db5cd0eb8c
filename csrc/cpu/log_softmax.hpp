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

}  // namespace s1::cpu
