// The kernels for CPUs with AVX2, FMA and F16C. All headers come before the pragma, so that their
// inline functions hold no such instructions.

#include "isa.hpp"

#if S1_HAS_X86_KERNELS

#include <immintrin.h>

#include <cstddef>
#include <utility>

#include "kernels.hpp"

#pragma GCC target("avx2,fma,f16c")

#define S1_ISA avx2
#define S1_WIDTH 8
#define S1_WIDE_PRODUCTS 0
#define S1_NEON 0
#include "kernels.inc"

#endif
