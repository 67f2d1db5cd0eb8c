#include "logprob_records.hpp"

#include <algorithm>
#include <bit>

namespace s1::cpu {

static_assert(std::endian::native == std::endian::little, "records are little-endian");

namespace {

template <typename T>
void append(std::string& out, const T* values, int64_t count) {
  out.append(reinterpret_cast<const char*>(values), static_cast<size_t>(count) * sizeof(T));
}

}  // namespace

void LogprobRecords::sample(const Sampler& sampler, const SampledRows& rows, int64_t* tokens) {
  bytes_.clear();
  const auto count = static_cast<size_t>(rows.count);
  const int64_t width = sampler.max_logprobs({rows.req_indices, count});
  if (width < 0) {
    sampler.sample(rows, tokens);
    return;
  }
  chosen_.resize(count);
  top_.resize(count * static_cast<size_t>(width));
  top_tokens_.resize(top_.size());
  const SampledLogprobs logprobs{width, chosen_.data(), top_.data(), top_tokens_.data()};
  sampler.sample(rows, tokens, &logprobs);
  for (int64_t i = 0; i < rows.count; ++i) {
    const int32_t wanted = sampler.num_logprobs(rows.req_indices[i]);
    if (wanted < 0) continue;
    const int32_t head[] = {rows.req_indices[i], wanted};
    append(bytes_, head, 2);
    append(bytes_, logprobs.chosen + i, 1);
    append(bytes_, logprobs.top_tokens + i * width, wanted);
    append(bytes_, logprobs.top + i * width, wanted);
  }
}

}  // namespace s1::cpu
