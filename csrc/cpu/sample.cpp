// Samples one token per row, as s1engine/ops/torch_sampling.py defines it.
//
// The filters keep the first tokens in order of descending probability (equal ones by ascending
// id). Only the beginning of that order is sorted: tokens within a few units of the largest logit,
// and more of them if these are not enough.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "isa.hpp"
#include "ops.hpp"
#include "sample_row.hpp"
#include "thread_pool.hpp"

namespace s1::cpu {
namespace {

constexpr float kMinTemperature = 1e-6f;
constexpr float kFirstReach = 8.0f;  // below the largest logit; doubled up to ...
constexpr float kLastReach = 64.0f;  // ... this, then all tokens

// One row: scaled logits, filters, and memory for the kept tokens.
struct Row {
  const float* scaled;
  int64_t size;
  float peak;
  int64_t top_k;  // `size` keeps all
  float top_p;    // 1 keeps all
  float min_p;    // 0 keeps all
  std::vector<int32_t>& tokens;
};

// Sum of e^(v - peak) over the tokens that top-k keeps. If it drops any, the kept ones are the
// first top_k of row.tokens.
float partition_sum(const Row& row) {
  if (row.top_k == row.size) {
    return static_cast<float>(sample_kernels().sum_exp(row.scaled, row.size, row.peak));
  }
  double total = 0.0;
  for (int64_t i = 0; i < row.top_k; ++i) {
    total += std::exp(row.scaled[row.tokens[static_cast<size_t>(i)]] - row.peak);
  }
  return static_cast<float>(total);
}

// Number of tokens, of the first `count` in order, that top-p and min-p keep.
int64_t count_kept(const Row& row, int64_t count) {
  const float lowest = row.peak + std::log(row.min_p);
  const float total = row.top_p < 1.0f ? partition_sum(row) : 1.0f;
  double before = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    const float value = row.scaled[row.tokens[static_cast<size_t>(i)]];
    const bool reached = row.top_p < 1.0f && before >= row.top_p;
    if (i > 0 && (reached || value < lowest)) return i;
    before += std::exp(value - row.peak) / total;
  }
  return count;
}

// Moves the kept tokens to the front; returns their number.
int64_t keep_tokens(const Row& row) {
  row.tokens.resize(static_cast<size_t>(row.size));
  for (float reach = kFirstReach;; reach *= 2.0f) {
    const bool all = reach > kLastReach;
    const float lowest = all ? -std::numeric_limits<float>::infinity() : row.peak - reach;
    const int64_t known = sample_kernels().collect(row.scaled, row.size, lowest, row.tokens.data());
    if (!all && known < row.top_k && row.top_k < row.size) continue;
    const int64_t count = std::min(known, row.top_k);
    sort_most_probable(row.scaled, row.tokens.data(), known, count);
    const int64_t kept = count_kept(row, count);
    if (all || kept < count || count == row.top_k) return kept;
  }
}

}  // namespace

void sort_most_probable(const float* values, int32_t* tokens, int64_t known, int64_t wanted) {
  const auto more_probable = [values](int32_t a, int32_t b) {
    return values[a] != values[b] ? values[a] > values[b] : a < b;
  };
  if (wanted < known) std::nth_element(tokens, tokens + wanted, tokens + known, more_probable);
  std::sort(tokens, tokens + wanted, more_probable);
}

int64_t sample_row(float* logits, int64_t size, const RowSampling& how, bool logits_sanitized) {
  static thread_local std::vector<int32_t> tokens;
  const SampleKernels& k = sample_kernels();
  const bool greedy = how.temperature == 0.0f;
  const float divisor = greedy ? 1.0f : std::max(how.temperature, kMinTemperature);
  const Peak peak = k.scale_logits(logits, size, divisor, logits_sanitized);
  if (greedy) return peak.token;
  const Row row{.scaled = logits,
                .size = size,
                .peak = peak.value,
                .top_k = how.top_k <= 0 || how.top_k > size ? size : how.top_k,
                .top_p = how.top_p,
                .min_p = how.min_p,
                .tokens = tokens};
  if (row.top_k == size && row.top_p >= 1.0f && row.min_p <= 0.0f) {
    return k.draw(logits, size, how.noise, peak);
  }
  const int64_t kept = keep_tokens(row);  // which may move the tokens
  return k.draw_among(logits, tokens.data(), kept, how.noise);
}

void sample(Address logits, Address out, int64_t rows, int64_t stride, int64_t size,
            Address temperature, Address top_k, Address top_p, Address min_p, Address seeds,
            Address positions, bool filtered, bool logits_sanitized) {
  const auto sampling = [&](int64_t i) {
    RowSampling how{.temperature = pointer<float>(temperature)[i],
                    .noise = {.seed = pointer<uint64_t>(seeds)[i],
                              .position = pointer<uint64_t>(positions)[i]}};
    if (filtered) {
      how.top_k = pointer<int32_t>(top_k)[i];
      how.top_p = pointer<float>(top_p)[i];
      how.min_p = pointer<float>(min_p)[i];
    }
    return how;
  };
  ThreadPool::instance().parallel_for(rows, kMinLogits / size + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      pointer<int64_t>(out)[i] =
          sample_row(pointer<float>(logits) + i * stride, size, sampling(i), logits_sanitized);
    }
  });
}

}  // namespace s1::cpu
