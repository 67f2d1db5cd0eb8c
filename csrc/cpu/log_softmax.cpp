#include "log_softmax.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "isa.hpp"
#include "sample_row.hpp"
#include "scratch.hpp"
#include "thread_pool.hpp"

namespace s1::cpu {

LogSoftmax::LogSoftmax(const float* logits, int64_t size)
    : size_(size), num_maxima_((size + kScanBatch - 1) / kScanBatch) {
  static thread_local Scratch memory;
  const SampleKernels& k = sample_kernels();
  float* copy = memory.get(size + num_maxima_);
  float* maxima = copy + size;
  k.sanitize_logits(logits, copy, size, nullptr);
  k.largest_of_batches(copy, size, maxima);
  peak_ = *std::max_element(maxima, maxima + num_maxima_);
  log_sum_ = std::log(k.sum_exp(copy, size, peak_));
  logits_ = copy;
  maxima_ = maxima;
}

float LogSoftmax::of(int64_t token) const {
  return static_cast<float>(double{logits_[token]} - peak_ - log_sum_);
}

int32_t LogSoftmax::rank(int64_t token) const {
  const float own = logits_[token];
  int32_t before = 0;
  for (int64_t i = 0; i < size_; ++i) {
    before += logits_[i] > own || (logits_[i] == own && i < token);
  }
  return before + 1;
}

void LogSoftmax::top(int64_t count, int32_t* tokens, float* logprobs) const {
  if (count == 0) return;
  // `count` batches have a logit as large as the count-th largest of their maxima.
  float lowest = -std::numeric_limits<float>::infinity();
  if (count <= num_maxima_) {
    static thread_local std::vector<float> maxima;
    maxima.assign(maxima_, maxima_ + num_maxima_);
    std::nth_element(maxima.begin(), maxima.begin() + count - 1, maxima.end(), std::greater<>());
    lowest = maxima[static_cast<size_t>(count - 1)];
  }
  static thread_local Scratch memory;
  auto* candidates = memory.get<int32_t>(size_);
  const int64_t known = sample_kernels().collect(logits_, size_, lowest, candidates);
  sort_most_probable(logits_, candidates, known, count);
  std::copy(candidates, candidates + count, tokens);
  for (int64_t i = 0; i < count; ++i) logprobs[i] = of(tokens[i]);
}

void score_rows(const ScoredRows& rows) {
  ThreadPool::instance().parallel_for(rows.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const LogSoftmax logprobs(rows.logits + i * rows.stride, rows.size);
      const int64_t token = rows.tokens[i];
      const bool known = token >= 0 && token < rows.size;
      rows.logprobs[i] = known ? logprobs.of(token) : -std::numeric_limits<float>::infinity();
      rows.ranks[i] = known ? logprobs.rank(token) : static_cast<int32_t>(rows.size) + 1;
      logprobs.top(rows.width, rows.top_tokens + i * rows.width, rows.top + i * rows.width);
    }
  });
}

}  // namespace s1::cpu
