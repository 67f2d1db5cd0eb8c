#include "sampler.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

#include "isa.hpp"
#include "log_softmax.hpp"
#include "sample_row.hpp"
#include "thread_pool.hpp"

namespace s1::cpu {
namespace {

float bounded(float logit) { return std::clamp(logit, -kLogitLimit, kLogitLimit); }

// As the kernel of this name replaces NaN and infinity.
float sanitize(float logit) { return std::isnan(logit) ? -kLogitLimit : bounded(logit); }

// a * b rounded to float: no compiler fuses it with the sum that follows.
float product(float a, float b) { return static_cast<float>(double{a} * double{b}); }

}  // namespace

Sampler::Sampler(const SamplingColumns& columns, int32_t num_rows, int64_t vocab_size,
                 std::vector<std::vector<int32_t>> banned_ids)
    : columns_(columns),
      vocab_size_(vocab_size),
      banned_ids_(std::move(banned_ids)),
      rows_(static_cast<size_t>(num_rows)) {}

void Sampler::add_row(int32_t req_index, std::vector<TokenBias> bias,
                      std::span<const int32_t> tokens, int32_t prompt_len,
                      std::vector<int32_t> ends) {
  RowRules& row = rows_[static_cast<size_t>(req_index)];
  std::erase_if(bias, [this](const TokenBias& b) { return !in_vocabulary(b.token); });
  row.bias = std::move(bias);
  std::erase_if(ends, [this](int32_t token) { return !in_vocabulary(token); });
  row.ends = std::move(ends);
  row.counts.reset();
  if (!tokens.empty()) row.counts.emplace(tokens, prompt_len);
}

void Sampler::count_appended(std::span<const int32_t> req_indices,
                             std::span<const int32_t> tokens) {
  for (size_t i = 0; i < tokens.size(); ++i) {
    std::optional<TokenCounts>& counts = rows_[static_cast<size_t>(req_indices[i])].counts;
    if (!counts) continue;
    const bool dropped = tokens[i] < 0;
    counts->add(dropped ? ~tokens[i] : tokens[i], dropped ? -1 : 1);
  }
}

void Sampler::penalize(float* logits, int32_t req_index) const {
  const float* penalties = columns_.penalties + 3 * static_cast<int64_t>(req_index);
  const float repetition = penalties[0], presence = penalties[1], frequency = penalties[2];
  for (const TokenCounts::Entry& entry : rows_[static_cast<size_t>(req_index)].counts->entries()) {
    if (!entry.occurs() || !in_vocabulary(entry.token)) continue;
    float logit = sanitize(logits[entry.token]);
    logit = logit > 0.0f ? logit / repetition : product(logit, repetition);
    if (entry.count > 0) {
      logit -= product(frequency, static_cast<float>(entry.count));
      logit -= presence;
    }
    logits[entry.token] = bounded(logit);
  }
}

int64_t Sampler::sample_row(const SampledRows& rows, int64_t i) const {
  float* logits = rows.logits + i * rows.stride;
  const int32_t req_index = rows.req_indices[i];
  const RowRules& rules = rows_[static_cast<size_t>(req_index)];
  for (const TokenBias& bias : rules.bias) {
    logits[bias.token] = sanitize(logits[bias.token]) + bias.value;
  }
  if (rules.counts) penalize(logits, req_index);
  const uint8_t* allowed = rows.allowed == nullptr ? nullptr : rows.allowed[i];
  const uint8_t banned = rows.banned == nullptr ? 0 : rows.banned[i];
  const bool sanitized = allowed != nullptr || banned != 0;
  if (sanitized) sample_kernels().sanitize_logits(logits, logits, vocab_size_, allowed);
  if (banned != 0) {
    const bool own = banned == kBanRowEnds;
    for (const int32_t id : own ? rules.ends : banned_ids_[banned - 1u]) logits[id] = -INFINITY;
  }
  const RowSampling how{.temperature = columns_.temperature[req_index],
                        .top_k = columns_.top_k[req_index],
                        .top_p = columns_.top_p[req_index],
                        .min_p = columns_.min_p[req_index],
                        .noise = {.seed = static_cast<uint64_t>(columns_.seeds[req_index]),
                                  .position = static_cast<uint64_t>(rows.positions[i])}};
  return cpu::sample_row(logits, vocab_size_, how, sanitized);
}

int64_t Sampler::max_logprobs(std::span<const int32_t> req_indices) const {
  int32_t most = -1;
  for (const int32_t req_index : req_indices) most = std::max(most, num_logprobs(req_index));
  return most;
}

int64_t Sampler::sample_with_logprobs(const SampledRows& rows, int64_t i,
                                      const SampledLogprobs& out) const {
  const int64_t wanted = num_logprobs(rows.req_indices[i]);
  if (wanted < 0) return sample_row(rows, i);
  const LogSoftmax logprobs(rows.raw + i * rows.stride, vocab_size_);
  logprobs.top(wanted, out.top_tokens + i * out.width, out.top + i * out.width);
  const int64_t token = sample_row(rows, i);
  out.chosen[i] = logprobs.of(token);
  return token;
}

void Sampler::sample(const SampledRows& rows, int64_t* tokens,
                     const SampledLogprobs* logprobs) const {
  ThreadPool::instance().parallel_for(
      rows.count, kMinLogits / vocab_size_ + 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          tokens[i] =
              logprobs == nullptr ? sample_row(rows, i) : sample_with_logprobs(rows, i, *logprobs);
        }
      });
}

}  // namespace s1::cpu
