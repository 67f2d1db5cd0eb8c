// Fuzz test of the CPU kernels without Python, for sanitizers: every operation in every instruction
// set of this CPU, with odd shapes, memory without spare bytes, and one to eight threads. Results
// are compared with double, and bit by bit between numbers of threads and between the sets of
// ARM64. Success: exit status 0 and a line of counts.
//
//   test_cpu [rounds [first round [case]]]
//
// Each case runs on a new thread, so that its scratch memory is exactly as long as needed.

#include <map>
#include <stdexcept>
#include <string>
#include <thread>

#include "cpu/isa.hpp"
#include "harness.hpp"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#include <sanitizer/common_interface_defs.h>
#define HAS_SANITIZER 1
#endif

// Unwritten memory holds NaN in every dtype.
extern "C" const char* __asan_default_options() {
  return "malloc_fill_byte=255:max_malloc_fill_size=1073741824";
}
extern "C" const char* __tsan_default_options() { return "halt_on_error=1"; }

namespace fuzz {
namespace {

struct CaseKind {
  const char* name;
  void (*run)(Case&);
};

constexpr CaseKind kKinds[] = {
    {"rms_norm", rms_norm},
    {"add_rms_norm", add_rms_norm},
    {"norm_residual", norm_residual},
    {"silu_and_mul", silu_and_mul},
    {"gelu_and_mul", gelu_and_mul},
    {"scale_rows", scale_rows},
    {"rope_write", rope_write},
    {"linear", linear},
    {"linear", linear},
    {"embed", embed},
    {"gather_rows", gather_rows},
    {"attention", attention},
    {"sample", sample},
    {"sampler", sampler},
    {"pool", pool},
    {"callers", callers},
    {"recorded_step", recorded_step},
    {"collective", collective},
    {"lost_rank", lost_rank},
};

// The current case, for print_case.
struct CurrentCase {
  std::string isa;
  const char* kind = "";
  long long round = 0;
  int threads = 1;
} current;

std::map<uint64_t, uint64_t> portable_digests;  // by seed

// Runs a case; returns its digest.
uint64_t run_case(const CaseKind& kind, uint64_t seed, int threads) {
  s1::cpu::set_num_threads(1);
  s1::cpu::set_num_threads(threads);
  current.threads = threads;
  uint64_t digest = 0;
  std::thread([&] {
    Case c(seed);
    kind.run(c);
    digest = c.digest();
  }).join();
  return digest;
}

void run_round(int64_t round, const std::string& only) {
  current.round = round;
  for (const CaseKind& kind : kKinds) {
    if (!only.empty() && only != kind.name) continue;
    current.kind = kind.name;
    const uint64_t seed = static_cast<uint64_t>(round) * 64 + static_cast<uint64_t>(&kind - kKinds);
    const uint64_t alone = run_case(kind, seed, 1);
    Case(0).check(run_case(kind, seed, 2 + static_cast<int>(round % 7)) == alone, "same bits");
    // The sets of ARM64 compute with the same vectors in the same order.
    if (current.isa == "portable") portable_digests[seed] = alone;
    if (current.isa.starts_with("neon")) {
      Case(0).check(alone == portable_digests[seed], "the bits of the portable set");
    }
  }
}

// Selects the instruction set; false if this machine lacks it.
bool select_isa(const std::string& isa) {
  try {
    s1::cpu::set_isa(isa);
  } catch (const std::invalid_argument&) {
    return false;
  }
  current.isa = isa;
  return true;
}

}  // namespace

void print_case() {
  std::fprintf(stderr, "case: %s, %s, round %lld, %d threads\n", current.kind, current.isa.c_str(),
               current.round, current.threads);
}

}  // namespace fuzz

int main(int argc, char** argv) {
  const int64_t rounds = argc > 1 ? std::atoll(argv[1]) : 20;
  const int64_t first = argc > 2 ? std::atoll(argv[2]) : 0;
#ifdef HAS_SANITIZER
  __sanitizer_set_death_callback(fuzz::print_case);
#endif
  std::string used;
  for (const char* isa : {"portable", "avx2", "avx512", "avx512_bf16", "neon", "neon_dot"}) {
    if (!fuzz::select_isa(isa)) continue;
    used += used.empty() ? isa : std::string(", ") + isa;
    for (int64_t round = first; round < first + rounds; ++round) {
      fuzz::run_round(round, argc > 3 ? argv[3] : "");
    }
  }
  std::printf("%lld rounds of the kernels in %s\n", static_cast<long long>(rounds), used.c_str());
  return 0;
}
