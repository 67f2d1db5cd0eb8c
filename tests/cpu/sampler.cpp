// Cases of the sampler of the persistent batch: rules and log-probabilities, one logit at a time.

#include "cpu/sampler.hpp"

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "sampling.hpp"

namespace fuzz {
namespace {

constexpr float kSmallest = -s1::cpu::kLogitLimit;

// A sequence with rules, and what the sampler must know of it.
struct RuledSequence {
  Filter filter;
  float penalties[3];  // repetition, presence, frequency
  std::vector<s1::cpu::Sampler::TokenBias> bias;
  bool counted;  // has penalties
  std::set<int32_t> prompt;
  std::map<int32_t, int32_t> output;  // counts

  // The definition, one logit at a time.
  float adjust(int32_t token, float logit) const {
    logit = std::isnan(logit) ? kSmallest : std::clamp(logit, kSmallest, -kSmallest);
    for (const auto& b : bias) logit += b.token == token ? b.value : 0.0f;
    const auto counted = output.find(token);
    const int32_t count = counted == output.end() ? 0 : counted->second;
    if (count > 0 || prompt.contains(token)) {
      logit = logit > 0.0f ? logit / penalties[0] : logit * penalties[0];
    }
    if (count > 0) {
      volatile float fall = penalties[2] * static_cast<float>(count);  // rounded alone
      logit -= fall;
      logit -= penalties[1];
    }
    return std::clamp(logit, kSmallest, -kSmallest);
  }
};

// The columns of `sequences`, which the sampler reads.
struct Columns {
  explicit Columns(Case& c, int64_t rows)
      : temperature(c, rows),
        top_p(c, rows),
        min_p(c, rows),
        penalties(c, 3 * rows),
        top_k(c, rows),
        num_logprobs(c, rows),
        seeds(c, rows) {}

  s1::cpu::SamplingColumns view() const {
    return {temperature.data(), top_k.data(),     top_p.data(),       min_p.data(),
            seeds.data(),       penalties.data(), num_logprobs.data()};
  }

  TightArray<float> temperature, top_p, min_p, penalties;
  TightArray<int32_t> top_k, num_logprobs;
  TightArray<int64_t> seeds;
};

// Writes row `row` of the columns, and hands its sequence to the sampler.
RuledSequence add_sequence(Case& c, Columns& columns, s1::cpu::Sampler& sampler, int32_t row) {
  const auto size = sampler.vocab_size();
  const auto token = [&] { return static_cast<int32_t>(c.pick(0, size - 1)); };
  RuledSequence s{
      .filter = {c.one_in(3) ? 0.0 : c.real(0.05, 2.0), c.one_in(2) ? 0 : c.pick(1, size),
                 c.one_in(2) ? 1.0 : c.real(0.05, 0.999), c.one_in(2) ? 0.0 : 0.1},
      .penalties = {1.0f, 0.0f, 0.0f},
      .bias = {},
      .counted = c.one_in(2),
      .prompt = {},
      .output = {}};
  for (int64_t n = c.pick(0, 3); n > 0; --n)
    s.bias.push_back({token(), static_cast<float>(c.real(-9, 9))});
  std::vector<int32_t> tokens;
  if (s.counted) {
    s.penalties[0] = static_cast<float>(c.real(0.5, 2.0));
    s.penalties[1] = static_cast<float>(c.real(-2.0, 2.0));
    s.penalties[2] = static_cast<float>(c.real(-2.0, 2.0));
    for (int64_t n = c.pick(1, 30); n > 0; --n) tokens.push_back(token());
  }
  const auto prompt_len = static_cast<int32_t>(c.pick(0, static_cast<int64_t>(tokens.size())));
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (i < static_cast<size_t>(prompt_len))
      s.prompt.insert(tokens[i]);
    else
      ++s.output[tokens[i]];
  }
  columns.temperature[row] = static_cast<float>(s.filter.temperature);
  columns.top_k[row] = static_cast<int32_t>(s.filter.top_k);
  columns.top_p[row] = static_cast<float>(s.filter.top_p);
  columns.min_p[row] = static_cast<float>(s.filter.min_p);
  columns.seeds[row] = c.pick(INT64_MIN, INT64_MAX);
  columns.num_logprobs[row] = static_cast<int32_t>(c.pick({-1, -1, 0, 5, 20}));
  std::copy(s.penalties, s.penalties + 3, columns.penalties.data() + 3 * row);
  sampler.add_row(row, s.bias, tokens, prompt_len);
  return s;
}

// Checks the log-probabilities of one row against double.
void check_logprobs(Case& c, const float* logits, int64_t size, int64_t token, int64_t wanted,
                    float chosen, const float* top, const int32_t* top_tokens) {
  std::vector<float> clean(logits, logits + size);
  for (float& v : clean) v = std::isnan(v) ? kSmallest : std::clamp(v, kSmallest, -kSmallest);
  const double peak = *std::max_element(clean.begin(), clean.end());
  double sum = 0.0;
  for (const float v : clean) sum += std::exp(v - peak);
  const auto logprob = [&](int64_t i) {
    return clean[static_cast<size_t>(i)] - peak - std::log(sum);
  };
  const auto near = [&](const char* what, int64_t at, float got, int64_t i) {
    c.near(what, at, got, logprob(i), 1e-5 + 1e-6 * std::abs(logprob(i)));
  };
  near("log-probability of the token", token, chosen, token);
  std::vector<int32_t> order(static_cast<size_t>(size));
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return clean[static_cast<size_t>(a)] > clean[static_cast<size_t>(b)];
  });
  for (int64_t i = 0; i < std::min(wanted, size); ++i) {
    c.near("likeliest token", i, top_tokens[i], order[static_cast<size_t>(i)], 0.0);
    near("its log-probability", i, top[i], top_tokens[i]);
  }
}

}  // namespace

void sampler(Case& c) {
  const auto num_rows = static_cast<int32_t>(c.pick(1, 4));
  const int64_t size = c.size(700, 9000), count = c.size(4, 9), stride = size + c.pick(0, 9);
  const std::vector<std::vector<int32_t>> banned_ids = {{0}, {0, static_cast<int32_t>(size - 1)}};
  Columns columns(c, num_rows);
  s1::cpu::Sampler sampler(columns.view(), num_rows, size, banned_ids);
  std::vector<RuledSequence> sequences;
  for (int32_t row = 0; row < num_rows; ++row) {
    sequences.push_back(add_sequence(c, columns, sampler, row));
  }
  std::vector<int32_t> appended_rows, appended;
  for (int64_t n = c.pick(0, 9); n > 0; --n) {
    const auto row = static_cast<int32_t>(c.pick(0, num_rows - 1));
    RuledSequence& s = sequences[static_cast<size_t>(row)];
    const bool drops = !s.output.empty() && c.one_in(2);
    const auto token = drops ? s.output.begin()->first : static_cast<int32_t>(c.pick(0, size - 1));
    if (s.counted && (s.output[token] += drops ? -1 : 1) == 0) s.output.erase(token);
    appended_rows.push_back(row);
    appended.push_back(drops ? ~token : token);
  }
  sampler.count_appended(appended_rows, appended);

  TightArray<float> logits(c, (count - 1) * stride + size);
  for (int64_t i = 0; i < logits.size(); ++i) logits[i] = static_cast<float>(c.real(-9.0, 9.0));
  for (int64_t n = c.pick(0, 9); n > 0; --n) logits[c.pick(0, logits.size() - 1)] = NAN;
  for (int64_t n = c.pick(0, 9); n > 0; --n) logits[c.pick(0, logits.size() - 1)] = 9.5f;  // equal
  const std::vector<float> before(logits.data(), logits.data() + logits.size());
  TightArray<int32_t> req_indices(c, count);
  TightArray<int64_t> positions(c, count), tokens(c, count);
  TightArray<uint8_t> banned(c, count);
  std::vector<std::vector<uint8_t>> masks(static_cast<size_t>(count));
  std::vector<const uint8_t*> allowed;
  for (int64_t i = 0; i < count; ++i) {
    req_indices[i] = static_cast<int32_t>(c.pick(0, num_rows - 1));
    positions[i] = c.pick(0, int64_t{1} << 40);
    banned[i] = static_cast<uint8_t>(c.pick(0, 2));
    std::vector<uint8_t>& mask = masks[static_cast<size_t>(i)];
    if (c.one_in(3)) {
      for (int64_t byte = 0; byte < (size + 7) / 8; ++byte) {
        mask.push_back(static_cast<uint8_t>(c.pick(0, 255)));
      }
      mask[static_cast<size_t>(size / 2 / 8)] = 255;
    }
    allowed.push_back(mask.empty() ? nullptr : mask.data());
  }
  const int64_t width = sampler.max_logprobs({req_indices.data(), static_cast<size_t>(count)});
  TightArray<float> chosen(c, count), top(c, count * std::max<int64_t>(width, 0));
  TightArray<int32_t> top_tokens(c, top.size());
  const s1::cpu::SampledLogprobs logprobs{width, chosen.data(), top.data(), top_tokens.data()};
  const bool any_banned = c.one_in(2), any_allowed = c.one_in(2);
  sampler.sample({.logits = logits.data(),
                  .raw = logits.data(),
                  .stride = stride,
                  .count = count,
                  .req_indices = req_indices.data(),
                  .positions = positions.data(),
                  .banned = any_banned ? banned.data() : nullptr,
                  .allowed = any_allowed ? allowed.data() : nullptr},
                 tokens.data(), width < 0 ? nullptr : &logprobs);

  for (int64_t i = 0; i < count; ++i) {
    const int32_t req_index = req_indices[i];
    const RuledSequence& s = sequences[static_cast<size_t>(req_index)];
    const float* raw = before.data() + i * stride;
    std::vector<float> scaled(static_cast<size_t>(size));
    for (int32_t id = 0; id < size; ++id) {
      scaled[static_cast<size_t>(id)] = s.adjust(id, raw[id]);
      const uint8_t* mask = any_allowed ? allowed[static_cast<size_t>(i)] : nullptr;
      if (mask != nullptr && (mask[id / 8] >> id % 8 & 1) == 0)
        scaled[static_cast<size_t>(id)] = -INFINITY;
    }
    if (any_banned && banned[i] != 0) {
      for (const int32_t id : banned_ids[banned[i] - 1u])
        scaled[static_cast<size_t>(id)] = -INFINITY;
    }
    if (*std::max_element(scaled.begin(), scaled.end()) == -INFINITY) continue;  // of one token
    const double t = s.filter.temperature;
    for (float& v : scaled) v /= t == 0.0 ? 1.0f : std::max(static_cast<float>(t), 1e-6f);
    check_row(c, scaled, s.filter, static_cast<uint64_t>(columns.seeds[req_index]),
              static_cast<uint64_t>(positions[i]), tokens[i]);
    const int64_t wanted = columns.num_logprobs[req_index];
    if (wanted >= 0) {
      check_logprobs(c, raw, size, tokens[i], wanted, chosen[i], top.data() + i * width,
                     top_tokens.data() + i * width);
    }
  }
  c.add_to_digest(tokens.data(), tokens.bytes());
}

}  // namespace fuzz
