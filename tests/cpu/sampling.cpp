// Cases of the sampler, against its definition (s1engine/ops/torch_sampling.py) in double.

#include <algorithm>

#include "cpu/kernels.hpp"
#include "harness.hpp"
#include "sampling.hpp"

namespace fuzz {
namespace {

// -log of the unit exponential of a token: Philox4x32-10 of its group.
double gumbel(uint64_t seed, uint64_t position, int64_t token) {
  uint32_t c[4] = {static_cast<uint32_t>(token / 4), static_cast<uint32_t>(position),
                   static_cast<uint32_t>(position >> 32), 0};
  auto k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9e3779b9u, k1 += 0xbb67ae85u) {
    const uint64_t p0 = uint64_t{c[0]} * 0xd2511f53u, p1 = uint64_t{c[2]} * 0xcd9e8d57u;
    const uint32_t next[4] = {
        static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(p1),
        static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(p0)};
    std::copy(next, next + 4, c);
  }
  const double uniform = (static_cast<float>(c[token % 4]) + 0.5f) * 0x1p-32;
  return -std::log(-std::log1p(-std::min(uniform, 1.0 - 0x1p-24)));
}

// The tokens that the filters keep. `slack` > 0: plus those that rounding may keep; `slack` < 0:
// minus those that rounding may drop.
std::vector<int32_t> kept(const std::vector<float>& scaled, const Filter& f, double slack) {
  std::vector<int32_t> order;
  for (size_t i = 0; i < scaled.size(); ++i) order.push_back(static_cast<int32_t>(i));
  const auto value = [&](int32_t i) { return scaled[static_cast<size_t>(i)]; };
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return value(a) > value(b); });
  const double peak = value(order[0]);
  if (f.top_k > 0) order.resize(std::min(order.size(), static_cast<size_t>(f.top_k)));
  double total = 0.0, before = 0.0;
  for (const int32_t i : order) total += std::exp(value(i) - peak);
  for (size_t n = 0; n < order.size(); ++n) {
    const bool reached = f.top_p < 1.0 && before >= f.top_p + slack;
    const bool low = value(order[n]) < peak + std::log(f.min_p) - slack;
    if (n > 0 && (reached || low)) {
      order.resize(n);
      break;
    }
    before += std::exp(value(order[n]) - peak) / total;
  }
  return order;
}

// A logit as the definition sanitizes and divides it.
float scale_logit(float logit, double temperature, bool logits_sanitized) {
  const float limit = s1::cpu::kLogitLimit;
  if (!logits_sanitized) logit = std::isnan(logit) ? -limit : std::clamp(logit, -limit, limit);
  return logit / std::max(static_cast<float>(temperature), 1e-6f);
}

}  // namespace

void check_row(Case& c, const std::vector<float>& scaled, const Filter& f, uint64_t seed,
               uint64_t position, int64_t token) {
  c.check(token >= 0 && token < static_cast<int64_t>(scaled.size()), "a token of the vocabulary");
  if (f.temperature == 0.0) {
    const auto best = std::max_element(scaled.begin(), scaled.end()) - scaled.begin();
    c.near("greedy token", 0, static_cast<double>(token), static_cast<double>(best), 0.0);
    return;
  }
  const auto perturbed = [&](int64_t i) {
    return scaled[static_cast<size_t>(i)] + gumbel(seed, position, i);
  };
  const std::vector<int32_t> possible = kept(scaled, f, 1e-4);
  c.check(std::find(possible.begin(), possible.end(), token) != possible.end(),
          "the filters keep the token");
  double best = -1e300;
  for (const int32_t i : kept(scaled, f, -1e-4)) best = std::max(best, perturbed(i));
  const double got = perturbed(token);
  const double slack = 1e-4 + 1e-6 * std::abs(best);
  c.near("the sampled token's noisy logit", token, std::min(got, best), best, slack);
}

void sample(Case& c) {
  const int64_t rows = c.size(4, 12), size = c.size(700, 9000), stride = size + c.pick(0, 9);
  const bool filtered = c.one_in(2), logits_sanitized = !c.one_in(2);
  TightArray<float> logits(c, (rows - 1) * stride + size);
  for (int64_t i = 0; i < logits.size(); ++i) logits[i] = static_cast<float>(c.real(-9.0, 9.0));
  for (int64_t n = logits_sanitized ? 0 : c.pick(0, 5); n > 0; --n) {
    constexpr float kOdd[] = {NAN, INFINITY, -INFINITY, 3e38f};
    logits[c.pick(0, logits.size() - 1)] = kOdd[c.pick(0, 3)];
  }
  for (int64_t n = c.pick(0, 9); n > 0; --n) logits[c.pick(0, logits.size() - 1)] = 9.5f;  // equal
  std::vector<float> before(logits.data(), logits.data() + logits.size());
  TightArray<int64_t> out(c, rows);
  TightArray<float> temperature(c, rows), top_p(c, rows), min_p(c, rows);
  TightArray<int32_t> top_k(c, rows);
  TightArray<uint64_t> seeds(c, rows), positions(c, rows);
  for (int64_t i = 0; i < rows; ++i) {
    temperature[i] = c.one_in(3) ? 0.0f : static_cast<float>(c.real(0.05, 2.0));
    top_k[i] = static_cast<int32_t>(c.one_in(2) ? 0 : c.pick(1, size + 9));
    top_p[i] = c.one_in(2) ? 1.0f : static_cast<float>(c.real(0.05, 0.999));
    min_p[i] = c.one_in(2) ? 0.0f : static_cast<float>(c.real(0.0, 0.3));
    seeds[i] = static_cast<uint64_t>(c.pick(0, INT64_MAX)) * 2;
    positions[i] = static_cast<uint64_t>(c.pick(0, int64_t{1} << 40));
  }
  s1::cpu::sample(logits.address(), out.address(), rows, stride, size, temperature.address(),
                  top_k.address(), top_p.address(), min_p.address(), seeds.address(),
                  positions.address(), filtered, logits_sanitized);
  for (int64_t i = 0; i < rows; ++i) {
    const double t = temperature[i];
    std::vector<float> scaled(before.begin() + i * stride, before.begin() + i * stride + size);
    for (float& logit : scaled) logit = scale_logit(logit, t == 0.0 ? 1.0 : t, logits_sanitized);
    const Filter filter = filtered ? Filter{t, top_k[i], top_p[i], min_p[i]} : Filter{t, 0, 1, 0};
    check_row(c, scaled, filter, seeds[i], positions[i], out[i]);
  }
  c.add_to_digest(out.data(), out.bytes());
}

}  // namespace fuzz
