// Cases of the operations whose rows are independent.

#include "harness.hpp"

namespace fuzz {
namespace {

// Norm of `dim` values from `at` on, and the roundings of float32 per value.
struct Norm {
  double scale;
  double error;

  Norm(const Numbers& x, int64_t at, int64_t dim, double eps) : error(dim + 8.0) {
    double squares = 0.0;
    for (int64_t i = 0; i < dim; ++i) squares += x[at + i] * x[at + i];
    scale = 1.0 / std::sqrt(squares / static_cast<double>(dim) + eps);
  }
};

void check_norm(Case& c, const Numbers& x, int64_t x_at, const Numbers& weight, const Numbers& out,
                int64_t out_at, double eps) {
  const Norm norm(x, x_at, weight.size(), eps);
  for (int64_t i = 0; i < weight.size(); ++i) {
    const double want = x[x_at + i] * norm.scale * weight[i];
    c.near("norm", out_at + i, out[out_at + i], want,
           tolerance(out.dtype(), want, norm.error * std::abs(want)));
  }
}

}  // namespace

void rms_norm(Case& c) {
  const DType dtype = c.dtype();
  const int64_t outer = c.size(9, 150), inner = c.pick(1, 4), dim = c.size(90, 400);
  const int64_t inner_stride = dim + c.pick(0, 9);
  const int64_t outer_stride = inner * inner_stride + c.pick(0, 9);
  const int64_t size = (outer - 1) * outer_stride + (inner - 1) * inner_stride + dim;
  const Numbers x = Numbers::random(c, dtype, size, c.real(0.1, 9.0));
  const Numbers weight = Numbers::random(c, dtype, dim);
  const Numbers out(c, dtype, outer * inner * dim);
  s1::cpu::rms_norm(static_cast<int>(dtype), x.address(), weight.address(), out.address(),
                    outer * inner, inner, outer_stride, inner_stride, dim, 1e-5f);
  for (int64_t row = 0; row < outer * inner; ++row) {
    const int64_t at = row / inner * outer_stride + row % inner * inner_stride;
    check_norm(c, x, at, weight, out, row * dim, 1e-5);
  }
  c.add_to_digest(out.data(), out.bytes());
}

void add_rms_norm(Case& c) {
  const DType dtype = c.dtype();
  const int64_t rows = c.size(9, 200), dim = c.size(90, 400);
  const int64_t x_stride = dim + c.pick(0, 9), stride = dim + c.pick(0, 9);
  const Numbers x = Numbers::random(c, dtype, (rows - 1) * x_stride + dim);
  const Numbers residual = Numbers::random(c, dtype, (rows - 1) * stride + dim, 4.0);
  const Numbers weight = Numbers::random(c, dtype, dim);
  const Numbers out(c, dtype, rows * dim);
  const std::vector<double> before = residual.values();
  s1::cpu::add_rms_norm(static_cast<int>(dtype), x.address(), residual.address(), weight.address(),
                        out.address(), rows, x_stride, stride, dim, 1e-6f);
  for (int64_t i = 0; i < residual.size(); ++i) {
    const bool added = i % stride < dim;
    const double want =
        before[static_cast<size_t>(i)] + (added ? x[i / stride * x_stride + i % stride] : 0.0);
    c.near("residual", i, residual[i], want, added ? tolerance(dtype, want, std::abs(want)) : 0.0);
  }
  for (int64_t row = 0; row < rows; ++row) {
    check_norm(c, residual, row * stride, weight, out, row * dim, 1e-6);
  }
  c.add_to_digest(out.data(), out.bytes());
}

void silu_and_mul(Case& c) {
  const DType dtype = c.dtype();
  const int64_t rows = c.size(9, 200), dim = c.size(90, 300), stride = 2 * dim + c.pick(0, 9);
  const Numbers x =
      Numbers::random(c, dtype, (rows - 1) * stride + 2 * dim, c.one_in(4) ? 120.0 : 5.0);
  const Numbers out(c, dtype, rows * dim);
  s1::cpu::silu_and_mul(static_cast<int>(dtype), x.address(), out.address(), rows, stride, dim);
  for (int64_t i = 0; i < out.size(); ++i) {
    const int64_t at = i / dim * stride + i % dim;
    const double want = silu(x[at]) * x[at + dim];
    c.near("silu", i, out[i], want, tolerance(dtype, want, 16.0 * std::abs(want)));
  }
  c.add_to_digest(out.data(), out.bytes());
}

void gelu_and_mul(Case& c) {
  const DType dtype = c.dtype();
  const int64_t rows = c.size(9, 200), dim = c.size(90, 300), stride = 2 * dim + c.pick(0, 9);
  const Numbers x =
      Numbers::random(c, dtype, (rows - 1) * stride + 2 * dim, c.one_in(4) ? 120.0 : 5.0);
  const Numbers out(c, dtype, rows * dim);
  s1::cpu::gelu_and_mul(static_cast<int>(dtype), x.address(), out.address(), rows, stride, dim);
  for (int64_t i = 0; i < out.size(); ++i) {
    const int64_t at = i / dim * stride + i % dim;
    const double want = gelu_tanh(x[at]) * x[at + dim];
    const double roundings = 16.0 + 8.0 * std::min(std::abs(gelu_exponent(x[at])), 100.0);
    c.near("gelu", i, out[i], want, tolerance(dtype, want, roundings * std::abs(want)));
  }
  c.add_to_digest(out.data(), out.bytes());
}

void norm_residual(Case& c) {
  const DType dtype = c.dtype();
  const int64_t rows = c.size(9, 100), dim = c.size(90, 300);
  const int64_t x_stride = dim + c.pick(0, 9), stride = dim + c.pick(0, 9);
  const Numbers x = Numbers::random(c, dtype, (rows - 1) * x_stride + dim);
  const Numbers residual = Numbers::random(c, dtype, (rows - 1) * stride + dim);
  const Numbers weight = Numbers::random(c, dtype, dim);
  const std::vector<double> before = residual.values();
  s1::cpu::norm_residual(static_cast<int>(dtype), x.address(), residual.address(), weight.address(),
                         rows, x_stride, stride, dim, 1e-6f);
  for (int64_t row = 0; row < rows; ++row) {
    double squares = 0.0;
    for (int64_t i = 0; i < dim; ++i) squares += x[row * x_stride + i] * x[row * x_stride + i];
    const double scale = 1.0 / std::sqrt(squares / static_cast<double>(dim) + 1e-6);
    for (int64_t i = 0; i < stride && row * stride + i < residual.size(); ++i) {
      const int64_t at = row * stride + i;
      const double was = before[static_cast<size_t>(at)];
      const double summand = i < dim ? x[row * x_stride + i] * scale * weight[i] : 0.0;
      const double terms = static_cast<double>(dim + 8) * std::abs(summand) + std::abs(was);
      c.near("residual", at, residual[at], was + summand,
             i < dim ? tolerance(dtype, was + summand, terms) : 0.0);
    }
  }
  c.add_to_digest(residual.data(), residual.bytes());
}

void scale_rows(Case& c) {
  const DType dtype = c.dtype();
  const int64_t rows = c.size(9, 100), dim = c.size(90, 300), stride = dim + c.pick(0, 9);
  const Numbers x = Numbers::random(c, dtype, (rows - 1) * stride + dim);
  const Numbers scales = Numbers::random(c, DType::kFloat32, 20);
  TightArray<int32_t> positions(c, rows);
  for (int64_t i = 0; i < rows; ++i) positions[i] = static_cast<int32_t>(c.pick(0, 19));
  const std::vector<double> before = x.values();
  s1::cpu::scale_rows(static_cast<int>(dtype), x.address(), scales.address(), positions.address(),
                      rows, stride, dim);
  for (int64_t i = 0; i < x.size(); ++i) {
    const bool scaled = i % stride < dim;
    const double want =
        before[static_cast<size_t>(i)] * (scaled ? scales[positions[i / stride]] : 1.0);
    c.near("scaled", i, x[i], want, scaled ? tolerance(dtype, want, std::abs(want)) : 0.0);
  }
  c.add_to_digest(x.data(), x.bytes());
}

void encode_row(const Numbers& in, int64_t at, int64_t dim, int8_t* out) {
  float largest = 0.0f;
  for (int64_t i = 0; i < dim; ++i) {
    largest = std::max(largest, static_cast<float>(std::abs(in[at + i])));
  }
  const float scale = std::max(largest / 127.0f, 0x1p-126f);
  for (int64_t i = 0; i < dim; ++i) {
    out[i] = static_cast<int8_t>(std::nearbyint(static_cast<float>(in[at + i]) / scale));
  }
  std::memcpy(out + dim, &scale, sizeof scale);
}

namespace {

// Tokens of q, k or v: heads one after the other, tokens a stride apart.
struct Heads {
  int64_t count, dim, stride;
  Numbers values;
  std::vector<double> before;

  Heads(Case& c, DType dtype, int64_t tokens, int64_t count, int64_t dim)
      : count(count),
        dim(dim),
        stride(count * dim + c.pick(0, 9)),
        values(Numbers::random(c, dtype, (tokens - 1) * stride + count * dim, 3.0)),
        before(values.values()) {}

  double before_at(int64_t i) const { return before[static_cast<size_t>(i)]; }

  // Every head is rotated by its token's angles; the gaps between tokens are unchanged.
  void check_rotated(Case& c, const TightArray<float>& cos_sin,
                     const TightArray<int32_t>& positions) const {
    for (int64_t i = 0; i < values.size(); ++i) {
      const int64_t lane = i % stride % dim, half = dim / 2;
      if (i % stride >= count * dim) {
        c.near("gap", i, values[i], before_at(i), 0.0);
        continue;
      }
      const float* angle = cos_sin.data() + positions[i / stride] * dim + lane % half;
      const double sine = lane < half ? -angle[half] : angle[half];
      const double want =
          before_at(i) * angle[0] + before_at(lane < half ? i + half : i - half) * sine;
      c.near("rotation", i, values[i], want, tolerance(values.dtype(), want, 24.0));
    }
  }
};

// The cache holds the rows of `heads` in their slots and is unchanged elsewhere.
void check_cache(Case& c, const Heads& heads, const TightArray<int64_t>& slots, int64_t block_size,
                 bool int8, const TightArray<int8_t>& cache, int64_t row_bytes) {
  std::vector<int8_t> want(static_cast<size_t>(cache.bytes()), 77);
  for (int64_t t = 0; t < slots.size(); ++t) {
    for (int64_t h = 0; h < heads.count; ++h) {
      const int64_t row =
          (slots[t] / block_size * heads.count + h) * block_size + slots[t] % block_size;
      int8_t* to = want.data() + row * row_bytes;
      const int64_t from = t * heads.stride + h * heads.dim;
      if (int8) {
        encode_row(heads.values, from, heads.dim, to);
      } else {
        const auto* row_values = reinterpret_cast<const void*>(heads.values.address(from));
        std::memcpy(to, row_values, static_cast<size_t>(row_bytes));
      }
    }
  }
  c.check(std::memcmp(want.data(), cache.data(), want.size()) == 0, "rows of the cache");
}

}  // namespace

void rope_write(Case& c) {
  const DType dtype = c.dtype();
  const bool int8 = c.one_in(2);
  const int64_t tokens = c.size(9, 60), groups = c.pick(1, 4), kv_heads = c.pick(1, 4);
  const int64_t dim = 2 * c.size(40, 90), block_size = c.pick(1, 20);
  const int64_t blocks = tokens / block_size + c.pick(1, 3), max_len = c.pick(1, 50);
  const Heads q(c, dtype, tokens, groups * kv_heads, dim), k(c, dtype, tokens, kv_heads, dim);
  const Heads v(c, dtype, tokens, kv_heads, dim);
  TightArray<float> cos_sin(c, max_len * dim);
  for (int64_t i = 0; i < cos_sin.size(); ++i) cos_sin[i] = static_cast<float>(c.real(-1.0, 1.0));
  TightArray<int32_t> positions(c, tokens);
  TightArray<int64_t> slots(c, tokens);
  const int64_t last = blocks * block_size - tokens, first = c.pick(0, last);
  for (int64_t t = 0; t < tokens; ++t) {
    positions[t] = static_cast<int32_t>(c.pick(0, max_len - 1));
    slots[t] = first + (tokens - 1 - t);
  }
  const int64_t row_bytes = int8 ? dim + 4 : dim * item_size(dtype);
  const int64_t cache_bytes = blocks * kv_heads * block_size * row_bytes;
  const int64_t step = int8 ? 1 : item_size(dtype);
  TightArray<int8_t> k_cache(c, cache_bytes, step), v_cache(c, cache_bytes, step);
  std::memset(k_cache.data(), 77, static_cast<size_t>(k_cache.size()));
  std::memset(v_cache.data(), 77, static_cast<size_t>(v_cache.size()));
  s1::cpu::rope_write(static_cast<int>(dtype), static_cast<int>(int8 ? DType::kInt8 : dtype),
                      q.values.address(), k.values.address(), v.values.address(), cos_sin.address(),
                      k_cache.address(), v_cache.address(), positions.address(), slots.address(),
                      tokens, groups * kv_heads, kv_heads, dim, block_size, q.stride, k.stride,
                      v.stride);
  q.check_rotated(c, cos_sin, positions);
  k.check_rotated(c, cos_sin, positions);
  check_cache(c, k, slots, block_size, int8, k_cache, row_bytes);
  check_cache(c, v, slots, block_size, int8, v_cache, row_bytes);
  c.add_to_digest(k_cache.data(), k_cache.bytes());
}

}  // namespace fuzz
