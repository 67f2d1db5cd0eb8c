// Finds out what the CPU has; the choice is one atomic pointer, so kernels may run meanwhile.

#include "isa.hpp"

#include <atomic>
#include <stdexcept>

namespace s1::cpu {
namespace {

struct Isa {
  const char* name;
  const Kernels* kernels;
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
#endif

// Best first.
const Isa kIsas[] = {
#if S1_HAS_X86_KERNELS
    {"avx512", avx512::kKernels, &avx512::kSampleKernels, has_avx512()},
    {"avx2", avx2::kKernels, &avx2::kSampleKernels, has_avx2()},
#endif
    {"portable", portable::kKernels, &portable::kSampleKernels, true},
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

const SampleKernels& sample_kernels() { return *current().sample_kernels; }

}  // namespace s1::cpu
