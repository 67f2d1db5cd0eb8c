// Splits a matrix product into pieces for the thread pool, and looks up rows of packed matrices.
//
// A piece is a few panels of the weights for a block of rows. The split changes no result: each sum
// runs over all columns in order.

#include <algorithm>
#include <cstring>

#include "isa.hpp"
#include "ops.hpp"
#include "scratch.hpp"
#include "thread_pool.hpp"

namespace s1::cpu {
namespace {

constexpr int64_t kPiecePanels = 4;    // panels of the widest kernel tile
constexpr int64_t kPieceRows = 96;     // x of a piece fits into the second-level cache
constexpr int64_t kFewRows = 2;        // up to here, reading the weights dominates
constexpr int64_t kClaims = 16;        // chunks per thread at least, so that threads end together
constexpr int64_t kMinWork = 1 << 15;  // multiply-adds below which one thread is faster than two

// x as the kernels read it, in memory of the calling thread.
PreparedRows prepare(const LinearKernels& k, const void* x, int64_t x_stride, int64_t rows,
                     int64_t columns, int64_t group) {
  if (k.prepared == PreparedType::kSame && columns % 2 == 0) return {x, x_stride, nullptr, nullptr};
  static thread_local Scratch values, scales, sums;
  PrepareRows args{.x = x, .stride = x_stride, .columns = columns, .group = group, .out = {}};
  if (k.prepared == PreparedType::kInt8) {
    const int64_t groups = columns / group;
    args.out = {values.get<int8_t>(rows * columns), columns, scales.get<float>(rows * groups),
                sums.get<int32_t>(rows * groups)};
  } else {
    const int64_t stride = padded(columns);  // larger than the two bytes of kSame need
    args.out = {values.get<float>(rows * stride), stride, nullptr, nullptr};
  }
  const int64_t chunk = (1 << 14) / columns + 1;
  ThreadPool::instance().parallel_for(
      rows, chunk, [&](int64_t begin, int64_t end) { k.prepare(args, begin, end); });
  return args.out;
}

}  // namespace

void linear(int dtype, int format, int epilogue, Address x, Address panels, Address scales,
            Address bias, Address out, int64_t rows, int64_t columns, int64_t outputs,
            int64_t group, int64_t x_stride, int64_t out_stride) {
  const LinearKernels& k = linear_kernels(DType{dtype}, WeightFormat{format});
  const Linear args{.x = prepare(k, pointer<const void>(x), x_stride, rows, columns, group),
                    .panels = pointer<const void>(panels),
                    .scales = pointer<const uint16_t>(scales),
                    .bias = pointer<const void>(bias),
                    .out = pointer<void>(out),
                    .out_stride = out_stride,
                    .columns = columns,
                    .outputs = outputs,
                    .group = group,
                    .epilogue = Epilogue{epilogue}};
  const bool gate = is_gate(args.epilogue);
  const int64_t count = ((gate ? outputs / 2 : outputs) + kPanel - 1) / kPanel;
  const int64_t step = gate ? kPiecePanels / 2 : kPiecePanels;
  const int64_t blocks = (rows + kPieceRows - 1) / kPieceRows;
  const int64_t pieces = (count + step - 1) / step * blocks;
  const bool alone = rows * columns * outputs < kMinWork;
  // The hardware prefetches neighbouring panels, so a thread claims a few consecutive pieces.
  ThreadPool& pool = ThreadPool::instance();
  const int64_t few = std::clamp<int64_t>(pieces / (kClaims * pool.size()), 1, 4);
  const int64_t chunk = alone ? pieces : rows <= kFewRows ? few : 1;
  pool.parallel_for(pieces, chunk, [&](int64_t piece, int64_t last) {
    for (; piece < last; ++piece) {
      const int64_t first = piece / blocks * step;
      const int64_t row = piece % blocks * kPieceRows;
      k.linear(args, first, std::min(first + step, count), row, std::min(row + kPieceRows, rows));
    }
  });
}

void embed(int dtype, int format, Address ids, Address panels, Address scales, Address out,
           int64_t rows, int64_t columns, int64_t outputs, int64_t group, int64_t first) {
  static thread_local Scratch scratch;
  const Embed args{.ids = pointer<const int32_t>(ids),
                   .first = first,
                   .panels = pointer<const void>(panels),
                   .scales = pointer<const uint16_t>(scales),
                   .out = pointer<void>(out),
                   .scratch = scratch.get(padded(columns)),
                   .columns = columns,
                   .outputs = outputs,
                   .group = group};
  linear_kernels(DType{dtype}, WeightFormat{format}).embed(args, 0, rows);
}

void gather_rows(Address x, Address index, Address out, int64_t rows, int64_t row_bytes,
                 int64_t x_rows, int64_t first) {
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = pointer<const int32_t>(index)[i] - first;
    char* to = pointer<char>(out) + i * row_bytes;
    if (row >= 0 && row < x_rows) {
      std::memcpy(to, pointer<const char>(x) + row * row_bytes, static_cast<size_t>(row_bytes));
    } else {
      std::memset(to, 0, static_cast<size_t>(row_bytes));
    }
  }
}

}  // namespace s1::cpu
