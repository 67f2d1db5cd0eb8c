// Splits the row-wise operations into chunks for the thread pool.

#include "ops.hpp"

#include <algorithm>

#include "isa.hpp"
#include "thread_pool.hpp"

namespace s1::cpu {
namespace {

// Elements per thread below which waking another one does not pay: some microseconds of work.
constexpr int64_t kMinElements = 32768;

// Runs a kernel over rows of `row_elements` each.
template <typename Args>
void for_rows(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t rows,
              int64_t row_elements) {
  ThreadPool& pool = ThreadPool::instance();
  const int64_t smallest = kMinElements / std::max<int64_t>(row_elements, 1) + 1;
  const int64_t share = rows / (4 * pool.size());
  pool.parallel_for(rows, std::max(smallest, share),
                    [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace

int num_threads() { return ThreadPool::instance().size(); }

void set_num_threads(int count) { ThreadPool::instance().resize(count); }

void rms_norm(int dtype, Address x, Address weight, Address out, int64_t rows, int64_t inner_rows,
              int64_t outer_stride, int64_t inner_stride, int64_t dim, float eps) {
  const RmsNorm args{.x = pointer<void>(x),
                     .residual = nullptr,
                     .weight = pointer<void>(weight),
                     .out = pointer<void>(out),
                     .inner_rows = inner_rows,
                     .outer_stride = outer_stride,
                     .inner_stride = inner_stride,
                     .residual_stride = 0,
                     .dim = dim,
                     .eps = eps};
  for_rows(kernels(DType{dtype}).rms_norm, args, rows, dim);
}

void add_rms_norm(int dtype, Address x, Address residual, Address weight, Address out, int64_t rows,
                  int64_t x_stride, int64_t residual_stride, int64_t dim, float eps) {
  const RmsNorm args{.x = pointer<void>(x),
                     .residual = pointer<void>(residual),
                     .weight = pointer<void>(weight),
                     .out = pointer<void>(out),
                     .inner_rows = 1,
                     .outer_stride = x_stride,
                     .inner_stride = 0,
                     .residual_stride = residual_stride,
                     .dim = dim,
                     .eps = eps};
  for_rows(kernels(DType{dtype}).rms_norm, args, rows, 2 * dim);
}

void norm_residual(int dtype, Address x, Address residual, Address weight, int64_t rows,
                   int64_t x_stride, int64_t residual_stride, int64_t dim, float eps) {
  const RmsNorm args{.x = pointer<void>(x),
                     .residual = pointer<void>(residual),
                     .weight = pointer<void>(weight),
                     .out = nullptr,
                     .inner_rows = 1,
                     .outer_stride = x_stride,
                     .inner_stride = 0,
                     .residual_stride = residual_stride,
                     .dim = dim,
                     .eps = eps};
  for_rows(kernels(DType{dtype}).norm_residual, args, rows, 2 * dim);
}

void silu_and_mul(int dtype, Address gate_up, Address out, int64_t rows, int64_t stride,
                  int64_t dim) {
  const GatedActivation args{
      .gate_up = pointer<void>(gate_up), .out = pointer<void>(out), .stride = stride, .dim = dim};
  for_rows(kernels(DType{dtype}).silu_and_mul, args, rows, 4 * dim);
}

void gelu_and_mul(int dtype, Address gate_up, Address out, int64_t rows, int64_t stride,
                  int64_t dim) {
  const GatedActivation args{
      .gate_up = pointer<void>(gate_up), .out = pointer<void>(out), .stride = stride, .dim = dim};
  for_rows(kernels(DType{dtype}).gelu_and_mul, args, rows, 4 * dim);
}

void scale_rows(int dtype, Address x, Address scales, Address positions, int64_t rows,
                int64_t stride, int64_t dim) {
  const ScaleRows args{.x = pointer<void>(x),
                       .scales = pointer<float>(scales),
                       .positions = pointer<int32_t>(positions),
                       .stride = stride,
                       .dim = dim};
  for_rows(kernels(DType{dtype}).scale_rows, args, rows, dim);
}

void rope_write(int dtype, int cache_dtype, Address q, Address k, Address v, Address cos_sin,
                Address k_cache, Address v_cache, Address positions, Address slots, int64_t tokens,
                int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t block_size,
                int64_t q_stride, int64_t k_stride, int64_t v_stride) {
  const RopeWrite args{.q = pointer<void>(q),
                       .k = pointer<void>(k),
                       .v = pointer<void>(v),
                       .cos_sin = pointer<float>(cos_sin),
                       .k_cache = pointer<void>(k_cache),
                       .v_cache = pointer<void>(v_cache),
                       .positions = pointer<int32_t>(positions),
                       .slots = pointer<int64_t>(slots),
                       .num_heads = num_heads,
                       .num_kv_heads = num_kv_heads,
                       .head_dim = head_dim,
                       .block_size = block_size,
                       .q_stride = q_stride,
                       .k_stride = k_stride,
                       .v_stride = v_stride};
  for_rows(kernels(DType{dtype}).cache(DType{cache_dtype}).rope_write, args, tokens,
           (num_heads + 2 * num_kv_heads) * head_dim);
}

}  // namespace s1::cpu
