// How one row of logits becomes one token; s1engine/ops/torch_sampling.py is the definition.

#pragma once

#include <cstdint>

#include "kernels.hpp"

namespace s1::cpu {

// Rows of a step below which waking another thread does not pay, in logits.
inline constexpr int64_t kMinLogits = 32768;

struct RowSampling {
  float temperature = 0.0f;  // 0 is greedy
  int32_t top_k = 0;         // 0 keeps all
  float top_p = 1.0f;        // 1 keeps all
  float min_p = 0.0f;        // 0 keeps all
  Noise noise{};
};

// A token of a row of `size` float32 logits, which are overwritten. `logits_sanitized`: NaN and
// infinity are already replaced.
int64_t sample_row(float* logits, int64_t size, const RowSampling& how, bool logits_sanitized);

// Moves the `wanted` tokens with the largest values to the front of the first `known`, in
// descending order; equal ones by ascending id.
void sort_most_probable(const float* values, int32_t* tokens, int64_t known, int64_t wanted);

}  // namespace s1::cpu
