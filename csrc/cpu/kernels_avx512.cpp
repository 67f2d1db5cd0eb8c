// The kernels for CPUs with AVX-512 (F, BW, VL, DQ): the source of AVX2 at twice the width. Its
// speed has not been measured yet. All headers come before the pragma, as in kernels_avx2.cpp.

#include "isa.hpp"

#if S1_HAS_X86_KERNELS

#include <immintrin.h>

#include <cstddef>
#include <utility>

#include "kernels.hpp"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")

#define S1_ISA avx512
#define S1_WIDTH 16
#define S1_WIDE_PRODUCTS 0
#define S1_NEON 0
#include "kernels.inc"

#endif
