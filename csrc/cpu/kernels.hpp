// The interface between the entry points (ops.cpp, attention.cpp, linear.cpp, sample.cpp) and the
// kernels of each instruction set: argument structs, and a table of functions per set and dtype.
//
// A kernel computes a range of rows on the calling thread, without allocating. Strides and sizes
// count elements. A kernel file may include only this header and types without functions: its code
// may hold instructions that other code must not run.

#pragma once

#include <cstdint>

namespace s1::cpu {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kInt8 };
constexpr int kNumDTypes = 3;  // of operations; int8 is for KV caches only
constexpr int64_t item_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Row i of x starts at (i / inner_rows) * outer_stride + (i % inner_rows) * inner_stride, so that a
// head of a token can be a row.
struct RmsNorm {
  const void* x;
  void* residual;  // [rows, dim], x is added to it first; null: none
  const void* weight;
  void* out;  // [rows, dim] contiguous
  int64_t inner_rows, outer_stride, inner_stride, residual_stride;
  int64_t dim;
  float eps;
};

struct GatedActivation {
  const void* gate_up;  // [rows, 2 * dim]
  void* out;            // [rows, dim] contiguous
  int64_t stride, dim;
};

// x[row] *= scales[positions[row]], for rows of `dim`.
struct ScaleRows {
  void* x;
  const float* scales;
  const int32_t* positions;
  int64_t stride, dim;
};

struct RopeWrite {
  void* q;
  void* k;
  const void* v;
  const float* cos_sin;  // [max_len, head_dim]
  void* k_cache;
  void* v_cache;
  const int32_t* positions;
  const int64_t* slots;
  int64_t num_heads, num_kv_heads, head_dim, block_size;
  int64_t q_stride, k_stride, v_stride;  // from token to token; heads are contiguous
};

// out = parts[0] + parts[1] + ..., in this order; plus the old out if `add`.
struct SumParts {
  const void* parts;  // `count` arrays, `stride` apart
  int64_t stride, count;
  void* out;
  bool add;
};

// Sizes in floats are padded to a multiple of this, which is a multiple of every vector width.
constexpr int64_t kPadding = 16;
constexpr int64_t padded(int64_t size) { return (size + kPadding - 1) / kPadding * kPadding; }

constexpr int64_t kTileKeys = 64;  // keys of one tile of attention

struct Attention {
  const void* q;
  const void* k_cache;  // [num_blocks, num_kv_heads, block_size, row_size]
  const void* v_cache;
  void* out;  // [T, num_kv_heads * group_size * head_dim]
  const int32_t* block_table;
  int64_t block_table_stride, q_stride;
  int64_t num_kv_heads, group_size, head_dim, block_size;
  int64_t window;      // keys that a query sees at most, its own included
  const float* sinks;  // [num_kv_heads * group_size], one more logit of each head; null: none
  float scale;

  int64_t width() const { return padded(head_dim); }
};

// Consecutive tokens of one sequence with the query heads of one KV head: query rows that read the
// same keys. Row r is token r / group_size, head r % group_size.
struct AttentionUnit {
  int64_t sequence;  // row of the block table
  int64_t kv_head;
  int64_t token;  // first token, index in the step
  int64_t num_tokens;
  int64_t position;   // of the first token in its sequence
  int64_t first_key;  // oldest position that a token sees; blocks before it may be freed

  // A context is summed in splits of this many keys, then the splits' results are merged in order.
  // Always, so that a token's result depends neither on threads nor on the rest of the step.
  static constexpr int64_t kSplit = 512;

  int64_t end() const { return position + num_tokens; }
  int64_t first_split() const { return first_key / kSplit; }
  int64_t end_split() const { return (end() + kSplit - 1) / kSplit; }
};

// Online-softmax state: per row the largest score and, relative to it, the sum of weights and the
// weighted sum of values.
struct SoftmaxState {
  float* values;  // [rows, width]
  float* max;
  float* sum;

  SoftmaxState(float* memory, int64_t rows, int64_t width)
      : values(memory), max(memory + rows * width), sum(max + rows) {}

  static int64_t size(int64_t rows, int64_t width) { return padded(rows * (width + 2)); }
};

// ---- matrices -----------------------------------------------------------------------------------

// Storage of a weight matrix [N, K]: panels of kPanel outputs (rows of the matrix) side by side, so
// that a vector holds one column of a panel. N and K are padded with zeros.
//   kNative  float32, float16  [N / 16][K][16]
//            bfloat16          [N / 16][K / 2][16][2]
//   kInt8    [N / 16][K / 4][16][4] bytes: value + 128
//   kInt4    [N / 16][K / 8][16][4] bytes: value + 8, of columns 0-3 in the low halves, 4-7 in the
//            high ones
// An integer means value * scale; scales are bfloat16 [N / 16][K / group][16], one for each output
// and `group` columns.
enum class WeightFormat : int32_t { kNative, kInt8, kInt4 };
constexpr int kNumWeightFormats = 3;
constexpr int64_t kPanel = 16;

enum class Epilogue : int32_t {
  kStore,       // out = sums
  kStoreFloat,  // the same in float32
  kAdd,         // out += sums
  kGate,        // out [rows, N / 2] = silu(first half of the sums) * second half
  kGateGelu,    // the same with gelu_tanh
};
constexpr bool is_gate(Epilogue e) { return e == Epilogue::kGate || e == Epilogue::kGateGelu; }

// x [rows, K] as `linear` reads it: unchanged (bfloat16 where the CPU multiplies it; plus a column
// of zeros if K is odd), widened to float, or as integers with a scale for each row and group.
struct PreparedRows {
  const void* values;  // [rows, stride]
  int64_t stride;
  const float* scales;  // [rows, K / group]
  const int32_t* sums;  // [rows, K / group], of the integers
};

// out = x W^T + bias. A row's result does not depend on other rows: each sum runs over the columns
// in order.
struct Linear {
  PreparedRows x;
  const void* panels;
  const uint16_t* scales;
  const void* bias;  // [N], null: none
  void* out;         // [rows, out_stride]
  int64_t out_stride;
  int64_t columns, outputs, group;
  Epilogue epilogue;
};

struct PrepareRows {
  const void* x;  // [rows, stride]
  int64_t stride, columns, group;
  PreparedRows out;
};

// Row ids[i] - first of W, or zeros where W has no such row.
struct Embed {
  const int32_t* ids;
  int64_t first;
  const void* panels;
  const uint16_t* scales;
  void* out;       // [rows, columns]
  float* scratch;  // [columns], padded
  int64_t columns, outputs, group;
};

// Element type that `prepare` writes; kSame: that of x, and `prepare` is needed only for odd K.
enum class PreparedType : int32_t { kSame, kFloat32, kInt8 };

struct LinearKernels {
  // Panels [first, last) for rows [begin, end); for a gate these are panels of the first half.
  void (*linear)(const Linear&, int64_t first, int64_t last, int64_t begin, int64_t end);
  void (*prepare)(const PrepareRows&, int64_t begin, int64_t end);
  void (*embed)(const Embed&, int64_t begin, int64_t end);
  PreparedType prepared;
};

constexpr int64_t kScanBatch = 256;   // logits that a scan skips at once
constexpr float kLogitLimit = 1e30f;  // LOGIT_LIMIT of the sampler's definition

// The largest value of a row and its token.
struct Peak {
  float value;
  int64_t token;
};

// Philox key and counter of one row.
struct Noise {
  uint64_t seed;
  uint64_t position;
};

// Scans over one row of `size` logits; see sample.inc.
struct SampleKernels {
  void (*sanitize_logits)(const float* logits, float* out, int64_t size, const uint8_t* allowed);
  void (*largest_of_batches)(const float* values, int64_t size, float* maxima);
  Peak (*scale_logits)(float* logits, int64_t size, float temperature, bool logits_sanitized);
  double (*sum_exp)(const float* values, int64_t size, float peak);
  int64_t (*collect)(const float* values, int64_t size, float lowest, int32_t* tokens);
  int64_t (*draw)(const float* scaled, int64_t size, const Noise&, const Peak& first);
  int64_t (*draw_among)(const float* scaled, const int32_t* tokens, int64_t count, const Noise&);
};

// Kernels that depend on the KV cache's dtype. attend computes a unit's whole context, attend_part
// one split of it into `part`; `scratch` holds attention_scratch floats.
struct CacheKernels {
  void (*rope_write)(const RopeWrite&, int64_t begin, int64_t end);
  void (*attend)(const Attention&, const AttentionUnit&, float* scratch);
  void (*attend_part)(const Attention&, const AttentionUnit&, int64_t split, float* part,
                      float* scratch);
};

struct Kernels {
  void (*rms_norm)(const RmsNorm&, int64_t begin, int64_t end);
  void (*norm_residual)(const RmsNorm&, int64_t begin, int64_t end);
  void (*silu_and_mul)(const GatedActivation&, int64_t begin, int64_t end);
  void (*gelu_and_mul)(const GatedActivation&, int64_t begin, int64_t end);
  void (*scale_rows)(const ScaleRows&, int64_t begin, int64_t end);
  void (*sum_parts)(const SumParts&, int64_t begin, int64_t end);  // elements, not rows
  // Merges all parts of a unit into the output.
  void (*merge_parts)(const Attention&, const AttentionUnit&, float* parts, float* scratch);
  CacheKernels own_cache;  // in the dtype of the operation
  CacheKernels int8_cache;

  const CacheKernels& cache(DType stored) const {
    return stored == DType::kInt8 ? int8_cache : own_cache;
  }
};

inline int64_t attention_scratch(const Attention& a, int64_t rows) {
  return (padded(rows) + 2 * kTileKeys) * a.width() + padded(rows) * kTileKeys +
         2 * SoftmaxState::size(rows, a.width());
}

using LinearTable = LinearKernels[kNumDTypes][kNumWeightFormats];

// One entry per DType. A set that the build or the machine lacks is never called.
namespace portable {
extern const Kernels kKernels[kNumDTypes];
extern const LinearTable kLinear;
extern const SampleKernels kSampleKernels;
}  // namespace portable
namespace avx2 {
extern const Kernels kKernels[kNumDTypes];
extern const LinearTable kLinear;
extern const SampleKernels kSampleKernels;
}  // namespace avx2
namespace avx512 {
extern const Kernels kKernels[kNumDTypes];
extern const LinearTable kLinear;
extern const SampleKernels kSampleKernels;
}  // namespace avx512
namespace avx512_bf16 {
extern const Kernels kKernels[kNumDTypes];
extern const LinearTable kLinear;
extern const SampleKernels kSampleKernels;
}  // namespace avx512_bf16
namespace neon {
extern const Kernels kKernels[kNumDTypes];
extern const LinearTable kLinear;
extern const SampleKernels kSampleKernels;
}  // namespace neon
namespace neon_dot {
extern const Kernels kKernels[kNumDTypes];
extern const LinearTable kLinear;
extern const SampleKernels kSampleKernels;
}  // namespace neon_dot

}  // namespace s1::cpu
