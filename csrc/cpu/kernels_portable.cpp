// The kernels for any CPU: vectors of four floats, which x86-64 and ARM64 always have.

#include <cstddef>
#include <utility>

#include "kernels.hpp"

#define S1_ISA portable
#define S1_WIDTH 4
#define S1_WIDE_PRODUCTS 0
#define S1_NEON 0
#include "kernels.inc"
