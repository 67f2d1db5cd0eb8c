// Which instruction set the kernels use: the best one that the CPU has, or the one a test asked
// for.

#pragma once

#include <string>

#include "kernels.hpp"

// Clang ignores `#pragma GCC target`, so with it (and on other CPUs) only the portable set is
// built.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define S1_HAS_X86_KERNELS 1
#else
#define S1_HAS_X86_KERNELS 0
#endif

namespace s1::cpu {

// "portable", "avx2", "avx512" or "avx512_bf16" (with bfloat16 and int8 products).
std::string isa();

// Takes one of these or "auto"; std::invalid_argument if unknown or if this machine lacks it.
void set_isa(const std::string& name);

// The kernels of the set in use.
const Kernels& kernels(DType dtype);
const LinearKernels& linear_kernels(DType dtype, WeightFormat format);
const SampleKernels& sample_kernels();

}  // namespace s1::cpu
