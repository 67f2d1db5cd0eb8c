// Cases of paged attention: steps of decodes and extends over caches of every type.

#include <limits>

#include "harness.hpp"

namespace fuzz {
namespace {

// One sequence of a step.
struct Span {
  int64_t context, pending;
};

// K or V of all sequences, and the paged cache with them. Unwritten slots are not initialised.
struct Cached {
  Numbers rows;               // [positions of all sequences, kv_heads, dim]
  TightArray<int8_t> memory;  // [blocks, kv_heads, block_size, a row]
  int64_t dim, row_bytes;
  bool int8;

  Cached(Case& c, DType dtype, bool int8, int64_t positions, int64_t kv_heads, int64_t dim,
         int64_t slots)
      : rows(Numbers::random(c, dtype, positions * kv_heads * dim, 2.0)),
        memory(c, slots * kv_heads * (int8 ? dim + 4 : dim * item_size(dtype)),
               int8 ? 1 : item_size(dtype)),
        dim(dim),
        row_bytes(int8 ? dim + 4 : dim * item_size(dtype)),
        int8(int8) {}

  void store(int64_t row, int64_t slot) {
    int8_t* to = memory.data() + slot * row_bytes;
    if (!int8) {
      const auto* from = reinterpret_cast<const void*>(rows.address(row * dim));
      std::memcpy(to, from, static_cast<size_t>(row_bytes));
      return;
    }
    encode_row(rows, row * dim, dim, to);
    float scale;
    std::memcpy(&scale, to + dim, sizeof scale);
    scales.resize(std::max(scales.size(), static_cast<size_t>(row) + 1));
    scales[static_cast<size_t>(row)] = scale;
  }

  // The value in the cache.
  double value(int64_t row, int64_t i) const {
    const double exact = rows[row * dim + i];
    if (!int8) return exact;
    const float scale = scales[static_cast<size_t>(row)];
    return std::nearbyint(static_cast<float>(exact) / scale) * static_cast<double>(scale);
  }

 private:
  std::vector<float> scales;  // of int8 rows
};

struct Step {
  DType dtype;
  bool int8;
  int64_t kv_heads, group, dim, block_size;
  std::vector<Span> spans;
  int64_t window;  // 0: full attention
  int64_t tokens = 0, positions = 0, blocks = 0, table_stride = 0;

  explicit Step(Case& c)
      : dtype(c.dtype()),
        int8(c.one_in(3)),
        kv_heads(c.pick(1, 3)),
        group(c.one_in(15) ? 66 : c.pick(1, 9)),
        dim(c.one_in(2) ? c.pick({32, 64, 96}) : 2 * c.size(20, 70)),
        block_size(c.one_in(2) ? c.pick({16, 32}) : c.pick(1, 40)),
        window(c.one_in(2)   ? 0
               : c.one_in(4) ? c.pick(1, 700)
                             : c.pick(1, 90)) {
    const bool decodes = c.one_in(2);
    for (int64_t s = c.pick(1, 4); s > 0; --s) {
      const int64_t context = c.one_in(10) ? c.pick(500, 1100) : c.pick(1, 150);
      add({context, decodes ? 1 : c.pick(1, std::min<int64_t>(context, 30))});
    }
    table_stride += c.pick(0, 3);
  }

  void add(const Span& span) {
    const int64_t count = (span.context + block_size - 1) / block_size;
    spans.push_back(span);
    tokens += span.pending;
    positions += span.context;
    blocks += count;
    table_stride = std::max(table_stride, count);
  }

  // Oldest of the first `end` positions that the last of them sees.
  int64_t oldest(int64_t end) const { return window == 0 ? 0 : std::max<int64_t>(end - window, 0); }
};

// Shuffled blocks for every sequence; entries before all windows or beyond its context are invalid.
TightArray<int32_t> block_table(Case& c, const Step& step, int64_t spare) {
  std::vector<int32_t> free;
  for (int64_t i = 0; i < step.blocks + spare; ++i) free.push_back(static_cast<int32_t>(i));
  for (size_t i = free.size() - 1; i > 0; --i) {
    std::swap(free[i], free[static_cast<size_t>(c.pick(0, static_cast<int64_t>(i)))]);
  }
  const auto rows = static_cast<int64_t>(step.spans.size());
  TightArray<int32_t> table(c, rows * step.table_stride);
  for (int64_t i = 0; i < table.size(); ++i) table[i] = -1 << 24;
  for (int64_t s = 0; s < rows; ++s) {
    const Span& span = step.spans[static_cast<size_t>(s)];
    const int64_t first = step.oldest(span.context - span.pending + 1) / step.block_size;
    for (int64_t i = first; i * step.block_size < span.context; ++i) {
      table[s * step.table_stride + i] = free.back();
      free.pop_back();
    }
  }
  return table;
}

// Checks softmax(q k^T scale) v of one head of one token that sees `seen` rows from `first` on,
// with one more logit `sink` (-infinity: none).
void check_head(Case& c, const Step& step, const double* query, const Cached& k, const Cached& v,
                int64_t first, int64_t seen, double scale, double sink, const Numbers& out,
                int64_t at) {
  std::vector<double> weights;
  double top = std::max(sink, -1e300), total = 0.0;
  for (int64_t i = 0; i < seen; ++i) {
    double score = 0.0;
    for (int64_t d = 0; d < step.dim; ++d) {
      score += query[d] * k.value(first + i * step.kv_heads, d);
    }
    weights.push_back(score * scale);
    top = std::max(top, weights.back());
  }
  for (double& weight : weights) total += weight = std::exp(weight - top);
  total += std::exp(sink - top);
  const bool rounded = step.dtype == DType::kBFloat16;  // the kernels round weights to bfloat16
  for (int64_t d = 0; d < step.dim; ++d) {
    double want = 0.0, terms = 0.0;
    for (int64_t i = 0; i < seen; ++i) {
      const double term =
          weights[static_cast<size_t>(i)] / total * v.value(first + i * step.kv_heads, d);
      want += term;
      terms += std::abs(term);
    }
    const double error = (rounded ? 0x1p-8 : 0.0) + 0x1p-24 * (256.0 + static_cast<double>(seen));
    c.near("attention", at + d, out[at + d], want,
           tolerance(step.dtype, want, 0.0) + error * terms);
  }
}

}  // namespace

void attention(Case& c) {
  const Step step(c);
  const int64_t spare = c.pick(0, 2), heads = step.kv_heads * step.group;
  const TightArray<int32_t> table = block_table(c, step, spare);
  const int64_t slots = (step.blocks + spare) * step.block_size;
  Cached k(c, step.dtype, step.int8, step.positions, step.kv_heads, step.dim, slots);
  Cached v(c, step.dtype, step.int8, step.positions, step.kv_heads, step.dim, slots);
  const auto sequences = static_cast<int64_t>(step.spans.size());
  TightArray<int32_t> cu_seqlens(c, sequences + 1), context_lens(c, sequences);
  cu_seqlens[0] = 0;
  for (int64_t s = 0, position = 0; s < sequences; ++s) {
    const Span& span = step.spans[static_cast<size_t>(s)];
    cu_seqlens[s + 1] = cu_seqlens[s] + static_cast<int32_t>(span.pending);
    context_lens[s] = static_cast<int32_t>(span.context);
    for (int64_t i = 0; i < span.context; ++i, ++position) {
      const int64_t block = table[s * step.table_stride + i / step.block_size];
      if (block < 0) continue;  // before all windows
      for (int64_t h = 0; h < step.kv_heads; ++h) {
        const int64_t slot = (block * step.kv_heads + h) * step.block_size + i % step.block_size;
        k.store(position * step.kv_heads + h, slot);
        v.store(position * step.kv_heads + h, slot);
      }
    }
  }
  const int64_t stride = heads * step.dim + c.pick(0, 9);
  const Numbers q =
      Numbers::random(c, step.dtype, (step.tokens - 1) * stride + heads * step.dim, 2.0);
  const Numbers out(c, step.dtype, step.tokens * heads * step.dim);
  const bool has_sinks = c.one_in(3);
  const Numbers sinks = Numbers::random(c, DType::kFloat32, heads, 4.0);
  const auto scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(step.dim)));
  s1::cpu::paged_attention(
      static_cast<int>(step.dtype), static_cast<int>(step.int8 ? DType::kInt8 : step.dtype),
      q.address(), k.memory.address(), v.memory.address(), out.address(), cu_seqlens.address(),
      context_lens.address(), table.address(), sequences, step.table_stride, heads, step.kv_heads,
      step.dim, step.block_size, stride, scale, step.window, has_sinks ? sinks.address() : 0);
  const std::vector<double> queries = q.values();
  for (int64_t s = 0, token = 0, position = 0; s < sequences; ++s) {
    const Span& span = step.spans[static_cast<size_t>(s)];
    for (int64_t i = 0; i < span.pending; ++i, ++token) {
      // The reference is slow: check only some heads of each token.
      const int64_t skip = span.context > 200 ? heads : (heads + 5) / 6;
      for (int64_t h = token % skip; h < heads; h += skip) {
        const int64_t end = span.context - span.pending + i + 1, oldest = step.oldest(end);
        const int64_t first = (position + oldest) * step.kv_heads + h / step.group;
        const double sink = has_sinks ? sinks[h] : -std::numeric_limits<double>::infinity();
        check_head(c, step, queries.data() + token * stride + h * step.dim, k, v, first,
                   end - oldest, scale, sink, out, (token * heads + h) * step.dim);
      }
    }
    position += span.context;
  }
  c.add_to_digest(out.data(), out.bytes());
}

}  // namespace fuzz
