// Cases of packed matrices: products and row look-ups.

#include "harness.hpp"

namespace fuzz {
namespace {

using s1::cpu::Epilogue;
using s1::cpu::is_gate;
using s1::cpu::kPanel;
using s1::cpu::WeightFormat;

// W [outputs, columns], packed as in csrc/cpu/kernels.hpp. The padding outputs of the last panel
// are not zeros here: they may belong to a larger matrix that begins with this one.
struct PackedMatrix {
  DType dtype;
  WeightFormat format;
  int64_t outputs, columns, group;
  int64_t panels;                // of kPanel outputs
  std::vector<double> values;    // [panels * kPanel, columns], integers if there are scales
  Numbers native;                // packed: this ...
  TightArray<uint8_t> integers;  // ... or this
  TightArray<uint16_t> scales;   // [panels, columns / group, kPanel]

  PackedMatrix(Case& c, DType dtype, WeightFormat format, int64_t outputs, int64_t columns,
               int64_t group)
      : dtype(dtype),
        format(format),
        outputs(outputs),
        columns(columns),
        group(group),
        panels((outputs + kPanel - 1) / kPanel),
        native(c, dtype, whole() ? 0 : panels * kPanel * (columns + columns % 2 * pairs()),
               pairs() ? 2 : 1),
        integers(c, whole() ? panels * kPanel * columns / per_byte() : 0, 4),
        scales(c, whole() ? panels * kPanel * columns / group : 0) {
    if (whole()) {
      pack_integers(c);
    } else {
      pack_native(c);
    }
  }

  // The weight in a product or a look-up.
  double value(int64_t n, int64_t k) const {
    const double raw = values[static_cast<size_t>(n * columns + k)];
    return whole() ? raw * scale(n, k) : raw;
  }
  double scale(int64_t n, int64_t k) const { return from_bfloat16(scales[scale_at(n, k)]); }
  Address address() const { return whole() ? integers.address() : native.address(); }
  Address scale_address() const { return whole() ? scales.address() : 0; }
  bool whole() const { return format != WeightFormat::kNative; }

 private:
  bool pairs() const { return dtype == DType::kBFloat16; }
  int64_t per_byte() const { return format == WeightFormat::kInt4 ? 2 : 1; }
  int64_t scale_at(int64_t n, int64_t k) const {
    return (n / kPanel * (columns / group) + k / group) * kPanel + n % kPanel;
  }

  void pack_native(Case& c) {
    const int64_t width = pairs() ? 2 : 1, steps = (columns + width - 1) / width;
    for (int64_t i = 0; i < native.size(); ++i) native.set(i, 0.0);
    for (int64_t n = 0; n < panels * kPanel; ++n) {
      for (int64_t k = 0; k < columns; ++k) {
        const int64_t step = n / kPanel * steps + k / width;
        const int64_t at = (step * kPanel + n % kPanel) * width + k % width;
        native.set(at, c.real(-1.0, 1.0));
        values.push_back(native[at]);
      }
    }
  }

  void pack_integers(Case& c) {
    const bool halves = format == WeightFormat::kInt4;
    std::memset(integers.data(), 0, static_cast<size_t>(integers.size()));
    for (int64_t i = 0; i < scales.size(); ++i) scales[i] = to_bfloat16(c.real(0.01, 0.1));
    for (int64_t n = 0; n < panels * kPanel; ++n) {
      for (int64_t k = 0; k < columns; ++k) {
        const int64_t value = halves ? c.pick(-8, 7) : c.pick(-127, 127);
        values.push_back(static_cast<double>(value));
        const int64_t step = n / kPanel * (columns / (4 * per_byte())) + k / (4 * per_byte());
        const int64_t at = (step * kPanel + n % kPanel) * 4 + k % 4;
        const int64_t stored = halves ? (value + 8) << (k / 4 % 2 * 4) : value + 128;
        integers[at] = static_cast<uint8_t>(integers[at] | stored);
      }
    }
  }
};

PackedMatrix random_matrix(Case& c, int64_t outputs) {
  const DType dtype = c.dtype();
  const auto format = WeightFormat{static_cast<int32_t>(c.pick(0, 2))};
  if (format == WeightFormat::kNative) return {c, dtype, format, outputs, c.size(70, 300), 1};
  const int64_t group = format == WeightFormat::kInt4 ? 32 : c.pick({32, 64, 128});
  return {c, dtype, format, outputs, group * c.pick(1, 3), group};
}

// x [rows, columns] as the kernel multiplies it, with its tolerance. Quantised values are multiples
// of a scale; one step is in doubt where the quotient is nearly between two integers.
struct Input {
  const PackedMatrix& w;
  const Numbers& x;
  int64_t stride;

  struct Part {
    double value, doubt;
  };

  Part at(int64_t row, int64_t k) const {
    const double value = x[row * stride + k];
    if (!w.whole()) return {value, 0.0};
    double peak = 0.0;
    for (int64_t i = k / w.group * w.group; i < (k / w.group + 1) * w.group; ++i) {
      peak = std::max(peak, std::abs(x[row * stride + i]));
    }
    if (peak == 0.0) return {0.0, 0.0};
    const double quotient = value * 127.0 / peak, step = peak / 127.0;
    const double rest = std::abs(quotient - std::floor(quotient) - 0.5);
    return {std::nearbyint(quotient) * step, rest < 1e-4 ? step : 0.0};
  }
};

struct Sum {
  double value = 0.0, error = 0.0;
};

std::vector<Sum> products(const Input& input, int64_t rows, const Numbers* bias) {
  const PackedMatrix& w = input.w;
  std::vector<Sum> sums(static_cast<size_t>(rows * w.outputs));
  for (int64_t row = 0; row < rows; ++row) {
    std::vector<Input::Part> x;
    for (int64_t k = 0; k < w.columns; ++k) x.push_back(input.at(row, k));
    for (int64_t n = 0; n < w.outputs; ++n) {
      Sum& sum = sums[static_cast<size_t>(row * w.outputs + n)];
      double terms = 0.0;
      for (int64_t k = 0; k < w.columns; ++k) {
        const auto [value, doubt] = x[static_cast<size_t>(k)];
        const double weight = w.value(n, k);
        sum.value += value * weight;
        sum.error += doubt * std::abs(weight);
        terms += std::abs(value * weight);
      }
      if (bias != nullptr) sum.value += (*bias)[n];
      sum.error += 0x1p-24 * (terms * static_cast<double>(w.columns + 4) + std::abs(sum.value));
    }
  }
  return sums;
}

}  // namespace

void linear(Case& c) {
  const auto epilogue = Epilogue{static_cast<int32_t>(c.pick(0, 4))};
  const bool gate = is_gate(epilogue), gelu = epilogue == Epilogue::kGateGelu;
  const int64_t outputs = gate ? 2 * kPanel * c.pick(1, 6) : c.size(90, 200);
  const PackedMatrix w = random_matrix(c, outputs);
  const int64_t rows = c.one_in(12) ? c.pick(97, 210) : c.size(8, 40);
  const int64_t stride = w.columns + c.pick(0, 9);
  const Numbers x = Numbers::random(c, w.dtype, (rows - 1) * stride + w.columns, 2.0);
  const bool biased = !gate && c.one_in(2);
  const Numbers bias = Numbers::random(c, w.dtype, biased ? outputs : 0);
  const DType out_dtype = epilogue == Epilogue::kStoreFloat ? DType::kFloat32 : w.dtype;
  const int64_t width = gate ? outputs / 2 : outputs, out_stride = width + c.pick(0, 9);
  const Numbers out = Numbers::random(c, out_dtype, (rows - 1) * out_stride + width);
  const std::vector<double> before = out.values();
  s1::cpu::linear(static_cast<int>(w.dtype), static_cast<int>(w.format), static_cast<int>(epilogue),
                  x.address(), w.address(), w.scale_address(), biased ? bias.address() : 0,
                  out.address(), rows, w.columns, outputs, w.group, stride, out_stride);
  const std::vector<Sum> sums = products({w, x, stride}, rows, biased ? &bias : nullptr);
  for (int64_t i = 0; i < out.size(); ++i) {
    const int64_t n = i % out_stride;
    const double was = before[static_cast<size_t>(i)];
    if (n >= width) {
      c.near("gap", i, out[i], was, 0.0);
      continue;
    }
    const Sum& sum = sums[static_cast<size_t>(i / out_stride * outputs + n)];
    Sum want = sum;
    if (epilogue == Epilogue::kAdd) want.value += was;
    if (gate) {
      const Sum& up = sums[static_cast<size_t>(i / out_stride * outputs + width + n)];
      const double activated = gelu ? gelu_tanh(sum.value) : silu(sum.value);
      const double roundings = gelu ? 16.0 + 8.0 * std::abs(gelu_exponent(sum.value)) : 16.0;
      want.value = activated * up.value;
      want.error = 1.2 * sum.error * (std::abs(up.value) + up.error) +
                   std::abs(activated) * up.error + 0x1p-24 * roundings * std::abs(want.value);
    }
    c.near("product", i, out[i], want.value,
           tolerance(out_dtype, want.value, std::abs(want.value)) + 1.01 * want.error);
  }
  c.add_to_digest(out.data(), out.bytes());
}

void embed(Case& c) {
  const PackedMatrix w = random_matrix(c, c.pick(1, 90));
  const int64_t rows = c.size(9, 60), first = c.pick(0, 40);
  TightArray<int32_t> ids(c, rows);
  for (int64_t i = 0; i < rows; ++i) ids[i] = static_cast<int32_t>(c.pick(0, w.outputs + 60));
  const Numbers out(c, w.dtype, rows * w.columns);
  s1::cpu::embed(static_cast<int>(w.dtype), static_cast<int>(w.format), ids.address(), w.address(),
                 w.scale_address(), out.address(), rows, w.columns, w.outputs, w.group, first);
  for (int64_t i = 0; i < out.size(); ++i) {
    const int64_t n = ids[i / w.columns] - first;
    const double want = n >= 0 && n < w.outputs ? w.value(n, i % w.columns) : 0.0;
    c.near("embedding", i, out[i], want, w.whole() ? tolerance(w.dtype, want, 0.0) : 0.0);
  }
  c.add_to_digest(out.data(), out.bytes());
}

void gather_rows(Case& c) {
  const int64_t rows = c.pick(1, 20), x_rows = c.pick(1, 30), bytes = c.pick(1, 90);
  const int64_t first = c.pick(0, 9);
  TightArray<uint8_t> x(c, x_rows * bytes), out(c, rows * bytes);
  for (int64_t i = 0; i < x.size(); ++i) x[i] = static_cast<uint8_t>(c.pick(1, 255));
  TightArray<int32_t> ids(c, rows);
  for (int64_t i = 0; i < rows; ++i) ids[i] = static_cast<int32_t>(c.pick(0, x_rows + 12));
  s1::cpu::gather_rows(x.address(), ids.address(), out.address(), rows, bytes, x_rows, first);
  for (int64_t i = 0; i < out.size(); ++i) {
    const int64_t row = ids[i / bytes] - first;
    const bool known = row >= 0 && row < x_rows;
    c.near("row", i, out[i], known ? x[row * bytes + i % bytes] : 0, 0.0);
  }
}

}  // namespace fuzz
