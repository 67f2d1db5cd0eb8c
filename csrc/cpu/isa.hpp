// Selects the instruction set of the kernels: the best one that the CPU has, or one set by a test.

#pragma once

#include <string>

#include "kernels.hpp"

// Clang ignores `#pragma GCC target`: with Clang, and on other CPUs, only the portable set is
// built.
#if defined(__GNUC__) && !defined(__clang__)
#define S1_HAS_TARGET_PRAGMA 1
#else
#define S1_HAS_TARGET_PRAGMA 0
#endif
#if defined(__x86_64__)
#define S1_HAS_X86_KERNELS S1_HAS_TARGET_PRAGMA
#else
#define S1_HAS_X86_KERNELS 0
#endif
#if defined(__aarch64__)
#define S1_HAS_NEON_KERNELS S1_HAS_TARGET_PRAGMA
#else
#define S1_HAS_NEON_KERNELS 0
#endif

namespace s1::cpu {

// Name of the set in use: "portable"; on x86-64 "avx2", "avx512" or "avx512_bf16" (bfloat16, int8
// products); on ARM64 "neon" or "neon_dot" (int8 products).
std::string isa();

// Selects one of these, or the best for "auto". std::invalid_argument: unknown, or not available.
void set_isa(const std::string& name);

// The kernels of the set in use.
const Kernels& kernels(DType dtype);
const LinearKernels& linear_kernels(DType dtype, WeightFormat format);
const SampleKernels& sample_kernels();

}  // namespace s1::cpu
