// The CPU operations of the Ops protocol. Tensors are passed as addresses of their first elements,
// with sizes and strides in elements. Nothing is checked here: the caller guarantees types, shapes
// and bounds. Shapes and letters as in s1engine/ops/__init__.py.

#pragma once

#include <cstdint>

#include "kernels.hpp"

namespace s1::cpu {

using Address = uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// Threads of an operation, the caller's included.
int num_threads();
void set_num_threads(int count);

// out [rows, dim] = rms_norm(x). Row i of x starts at (i / inner_rows) * outer_stride +
// (i % inner_rows) * inner_stride.
void rms_norm(int dtype, Address x, Address weight, Address out, int64_t rows, int64_t inner_rows,
              int64_t outer_stride, int64_t inner_stride, int64_t dim, float eps);

// residual += x, out = rms_norm(residual)
void add_rms_norm(int dtype, Address x, Address residual, Address weight, Address out, int64_t rows,
                  int64_t x_stride, int64_t residual_stride, int64_t dim, float eps);

// residual += rms_norm(x)
void norm_residual(int dtype, Address x, Address residual, Address weight, int64_t rows,
                   int64_t x_stride, int64_t residual_stride, int64_t dim, float eps);

// out [rows, dim] = silu(gate_up[:, :dim]) * gate_up[:, dim:]
void silu_and_mul(int dtype, Address gate_up, Address out, int64_t rows, int64_t stride,
                  int64_t dim);

// The same with gelu_tanh.
void gelu_and_mul(int dtype, Address gate_up, Address out, int64_t rows, int64_t stride,
                  int64_t dim);

// x [rows, dim] *= scales[positions], a float for each row, in place.
void scale_rows(int dtype, Address x, Address scales, Address positions, int64_t rows,
                int64_t stride, int64_t dim);

// Rotates q and k in place and writes k and v to the caches; strides are from token to token.
// `cache_dtype` is `dtype` or int8, whose rows hold a scale too (kv_quant.inc).
void rope_write(int dtype, int cache_dtype, Address q, Address k, Address v, Address cos_sin,
                Address k_cache, Address v_cache, Address positions, Address slots, int64_t tokens,
                int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t block_size,
                int64_t q_stride, int64_t k_stride, int64_t v_stride);

// out [T, Hq * D] = causal attention of q over the cached context of its sequence, or over its last
// `window` keys if that is not 0. Blocks before all windows are not read. `sinks`: one float per
// query head, 0: none.
void paged_attention(int dtype, int cache_dtype, Address q, Address k_cache, Address v_cache,
                     Address out, Address cu_seqlens_q, Address context_lens, Address block_table,
                     int64_t sequences, int64_t block_table_stride, int64_t num_heads,
                     int64_t num_kv_heads, int64_t head_dim, int64_t block_size, int64_t q_stride,
                     float scale, int64_t window, Address sinks);

// out = x [rows, columns] W^T + bias, for W [outputs, columns] in panels (kernels.hpp); `format` is
// a WeightFormat, `epilogue` an Epilogue. 0: no bias or no scales.
void linear(int dtype, int format, int epilogue, Address x, Address panels, Address scales,
            Address bias, Address out, int64_t rows, int64_t columns, int64_t outputs,
            int64_t group, int64_t x_stride, int64_t out_stride);

// out [rows, columns] = row ids[i] - first of W, or zeros where W has no such row; ids are int32.
void embed(int dtype, int format, Address ids, Address panels, Address scales, Address out,
           int64_t rows, int64_t columns, int64_t outputs, int64_t group, int64_t first);

// out [rows, row_bytes] = row index[i] - first of x [x_rows, row_bytes], or zeros likewise.
void gather_rows(Address x, Address index, Address out, int64_t rows, int64_t row_bytes,
                 int64_t x_rows, int64_t first);

// out [rows] int64 = a token of each row of float32 logits [rows, size], which are overwritten. The
// other arrays have one value per row; top_k, top_p and min_p are read only if `filtered`.
// `logits_sanitized`: NaN and infinity are already replaced.
void sample(Address logits, Address out, int64_t rows, int64_t stride, int64_t size,
            Address temperature, Address top_k, Address top_p, Address min_p, Address seeds,
            Address positions, bool filtered, bool logits_sanitized);

}  // namespace s1::cpu
