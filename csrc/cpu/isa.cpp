// Detects the CPU's instruction sets. The selection is one atomic pointer: kernels may be running.

#include "isa.hpp"

#if S1_HAS_NEON_KERNELS
#include <sys/auxv.h>
#endif

#include <atomic>
#include <stdexcept>

namespace s1::cpu {
namespace {

struct Isa {
  const char* name;
  const Kernels* kernels;
  const LinearTable* linear;
  const SampleKernels* sample_kernels;
  bool usable;
};

#if S1_HAS_X86_KERNELS
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512_bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512vnni");
}
#endif

#if S1_HAS_NEON_KERNELS
bool has_dot_products() { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }
#endif

// Best first.
const Isa kIsas[] = {
#if S1_HAS_X86_KERNELS
    {"avx512_bf16", avx512_bf16::kKernels, &avx512_bf16::kLinear, &avx512_bf16::kSampleKernels,
     has_avx512_bf16()},
    {"avx512", avx512::kKernels, &avx512::kLinear, &avx512::kSampleKernels, has_avx512()},
    {"avx2", avx2::kKernels, &avx2::kLinear, &avx2::kSampleKernels, has_avx2()},
#endif
#if S1_HAS_NEON_KERNELS
    {"neon_dot", neon_dot::kKernels, &neon_dot::kLinear, &neon_dot::kSampleKernels,
     has_dot_products()},
    {"neon", neon::kKernels, &neon::kLinear, &neon::kSampleKernels, true},
#endif
    {"portable", portable::kKernels, &portable::kLinear, &portable::kSampleKernels, true},
};

std::atomic<const Isa*> selected = nullptr;

const Isa& find(const std::string& name) {
  for (const Isa& isa : kIsas) {
    if (isa.usable && (name == "auto" || name == isa.name)) return isa;
  }
  throw std::invalid_argument("no such instruction set on this machine: " + name);
}

const Isa& current() {
  if (selected.load(std::memory_order_relaxed) == nullptr) selected = &find("auto");
  return *selected.load(std::memory_order_relaxed);
}

}  // namespace

std::string isa() { return current().name; }

void set_isa(const std::string& name) { selected = &find(name); }

const Kernels& kernels(DType dtype) { return current().kernels[static_cast<int>(dtype)]; }

const LinearKernels& linear_kernels(DType dtype, WeightFormat format) {
  return (*current().linear)[static_cast<int>(dtype)][static_cast<int>(format)];
}

const SampleKernels& sample_kernels() { return *current().sample_kernels; }

}  // namespace s1::cpu
