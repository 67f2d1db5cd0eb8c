// The kernels for CPUs with AVX-512 and its products of bfloat16 pairs and of four bytes (VNNI).
// All headers come before the pragma, as in kernels_avx2.cpp.

#include "isa.hpp"

#if S1_HAS_X86_KERNELS

#include <immintrin.h>

#include <cstddef>
#include <utility>

#include "kernels.hpp"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,avx2,fma,f16c")

#define S1_ISA avx512_bf16
#define S1_WIDTH 16
#define S1_WIDE_PRODUCTS 1
#define S1_NEON 0
#include "kernels.inc"

#endif
