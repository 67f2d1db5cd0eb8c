// The kernels for ARM64: the portable vectors, which the compiler already maps to NEON, with named
// conversions and with larger tiles for its 32 registers. Same bits as the portable set. Its speed
// has not been measured yet.

#include "isa.hpp"

#if S1_HAS_NEON_KERNELS

#include <arm_neon.h>

#include <cstddef>
#include <utility>

#include "kernels.hpp"

#define S1_ISA neon
#define S1_WIDTH 4
#define S1_WIDE_PRODUCTS 0
#define S1_NEON 1
#include "kernels.inc"

#endif
