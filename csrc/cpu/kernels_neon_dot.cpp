// The kernels for ARM64 CPUs with products of four bytes (DotProd, ARMv8.2): those of NEON, with
// exact integer sums of int8 and int4 weights. Same bits as the portable set. Its speed has not
// been measured yet. All headers come before the pragma, as in kernels_avx2.cpp.

#include "isa.hpp"

#if S1_HAS_NEON_KERNELS

#include <arm_neon.h>

#include <cstddef>
#include <utility>

#include "kernels.hpp"

#pragma GCC target("arch=armv8.2-a+dotprod")

#define S1_ISA neon_dot
#define S1_WIDTH 4
#define S1_WIDE_PRODUCTS 0
#define S1_NEON 2
#include "kernels.inc"

#endif
