// Shared by the fuzz test of csrc/cpu: seeded random choices, arrays without spare memory, the
// storage dtypes, and comparison with results in double.

#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <random>
#include <vector>

#include "cpu/ops.hpp"

namespace fuzz {

using s1::cpu::Address;
using s1::cpu::DType;

// Prints the current case, before the process ends because of it.
void print_case();

// One case: its random choices, and a digest of its results, which must not depend on threads.
class Case {
 public:
  explicit Case(uint64_t seed) : random_(seed) {}

  int64_t pick(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random_);
  }
  int64_t pick(std::initializer_list<int64_t> options) {
    return options.begin()[pick(0, static_cast<int64_t>(options.size()) - 1)];
  }
  bool one_in(int64_t count) { return pick(1, count) == 1; }
  // Mostly up to `few`; sometimes up to `many`, which several threads share.
  int64_t size(int64_t few, int64_t many) { return one_in(5) ? pick(few, many) : pick(1, few); }
  double real(double low, double high) {
    return std::uniform_real_distribution<double>(low, high)(random_);
  }
  DType dtype() { return DType{static_cast<int32_t>(pick(0, s1::cpu::kNumDTypes - 1))}; }

  void check(bool ok, const char* what) {
    if (!ok) fail(what, 0, 0.0, 0.0);
  }
  void near(const char* what, int64_t at, double got, double want, double tolerance) {
    if (!(std::abs(got - want) <= tolerance)) fail(what, at, got, want);  // also for NaN
  }
  void add_to_digest(const void* memory, int64_t bytes) {
    const auto* p = static_cast<const unsigned char*>(memory);
    for (int64_t i = 0; i < bytes; ++i) digest_ = (digest_ ^ p[i]) * 0x100000001b3u;
  }
  uint64_t digest() const { return digest_; }

 private:
  [[noreturn]] static void fail(const char* what, int64_t at, double got, double want) {
    print_case();
    std::fprintf(stderr, "%s, at %lld: %.9g, should be %.9g\n", what, static_cast<long long>(at),
                 got, want);
    std::_Exit(1);
  }

  std::mt19937_64 random_;
  uint64_t digest_ = 0xcbf29ce484222325u;
};

// An array that ends where its memory ends; it often begins off the boundaries of vectors, at a
// multiple of `step` elements.
template <typename T>
class TightArray {
 public:
  TightArray(Case& c, int64_t count, int64_t step = 1) : size_(count) {
    const int64_t before = c.one_in(3) ? c.pick(1, 7) * step : 0;
    memory_.reset(new std::byte[static_cast<size_t>(before + count) * sizeof(T)]);
    data_ = reinterpret_cast<T*>(memory_.get()) + before;
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  int64_t size() const { return size_; }
  int64_t bytes() const { return size_ * static_cast<int64_t>(sizeof(T)); }
  Address address() const { return reinterpret_cast<Address>(data_); }

 private:
  std::unique_ptr<std::byte[]> memory_;
  T* data_;
  int64_t size_;
};

// ---- storage types ------------------------------------------------------------------------------

// Largest relative error of rounding to nearest.
inline double unit(DType dtype) {
  return dtype == DType::kFloat32 ? 0x1p-24 : dtype == DType::kBFloat16 ? 0x1p-8 : 0x1p-11;
}

inline uint16_t to_bfloat16(double value) {
  const auto bits = std::bit_cast<uint32_t>(static_cast<float>(value));
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
// GCC 12 has no _Float16 in C++ for ARM64.
#ifdef __aarch64__
using Half = __fp16;
#else
using Half = _Float16;
#endif

inline double from_bfloat16(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

// Numbers in memory, in one of the three dtypes.
class Numbers {
 public:
  // Not initialised; begins at a multiple of `step` numbers.
  Numbers(Case& c, DType dtype, int64_t count, int64_t step = 1)
      : dtype_(dtype), memory_(c, count * item_size(dtype) / 2, step * item_size(dtype) / 2) {}

  // Uniform within +-scale.
  static Numbers random(Case& c, DType dtype, int64_t count, double scale = 1.0) {
    Numbers numbers(c, dtype, count);
    for (int64_t i = 0; i < count; ++i) numbers.set(i, c.real(-scale, scale));
    return numbers;
  }

  DType dtype() const { return dtype_; }
  int64_t size() const { return memory_.bytes() / item_size(dtype_); }
  int64_t bytes() const { return memory_.bytes(); }
  const uint16_t* data() const { return memory_.data(); }
  Address address(int64_t i = 0) const {
    return memory_.address() + static_cast<Address>(i * item_size(dtype_));
  }

  double operator[](int64_t i) const {
    const void* at = reinterpret_cast<const void*>(address(i));
    float wide;
    uint16_t bits;
    Half half;
    switch (dtype_) {
      case DType::kFloat32:
        std::memcpy(&wide, at, sizeof wide);
        return wide;
      case DType::kBFloat16:
        std::memcpy(&bits, at, sizeof bits);
        return from_bfloat16(bits);
      default:
        std::memcpy(&half, at, sizeof half);
        return static_cast<double>(half);
    }
  }

  void set(int64_t i, double value) {
    void* at = reinterpret_cast<void*>(address(i));
    const auto wide = static_cast<float>(value);
    const uint16_t bits = to_bfloat16(value);
    const auto half = static_cast<Half>(value);
    if (dtype_ == DType::kFloat32) std::memcpy(at, &wide, sizeof wide);
    if (dtype_ == DType::kBFloat16) std::memcpy(at, &bits, sizeof bits);
    if (dtype_ == DType::kFloat16) std::memcpy(at, &half, sizeof half);
  }

  std::vector<double> values() const {
    std::vector<double> all;
    for (int64_t i = 0; i < size(); ++i) all.push_back((*this)[i]);
    return all;
  }

 private:
  DType dtype_;
  TightArray<uint16_t> memory_;
};

// Tolerance of a result in `dtype`, computed in float32 from terms. `terms`: sum of their
// magnitudes, each times its number of roundings.
inline double tolerance(DType dtype, double want, double terms) {
  return 1.01 * unit(dtype) * std::abs(want) + 0x1p-24 * terms +
         (dtype == DType::kFloat16 ? 0x1p-24 : 1e-30);
}

inline double silu(double v) { return v / (1.0 + std::exp(-v)); }

// e^u in gelu_tanh(v) = v / (1 + e^u); its error grows with u.
inline double gelu_exponent(double v) { return -1.5957691216057308 * (v + 0.044715 * v * v * v); }
inline double gelu_tanh(double v) { return v / (1.0 + std::exp(gelu_exponent(v))); }

// ---- cases --------------------------------------------------------------------------------------

void rms_norm(Case& c);
void add_rms_norm(Case& c);
void norm_residual(Case& c);
void silu_and_mul(Case& c);
void gelu_and_mul(Case& c);
void scale_rows(Case& c);
void rope_write(Case& c);
void linear(Case& c);
void embed(Case& c);
void gather_rows(Case& c);
void attention(Case& c);
void sample(Case& c);
void sampler(Case& c);
void pool(Case& c);
void callers(Case& c);
void recorded_step(Case& c);
void collective(Case& c);
void lost_rank(Case& c);

// Encodes a row of an int8 KV cache as s1engine/ops/kv_quant.py defines it: `dim` values of `in`
// from `at` on, to `out` [dim + 4].
void encode_row(const Numbers& in, int64_t at, int64_t dim, int8_t* out);

}  // namespace fuzz
