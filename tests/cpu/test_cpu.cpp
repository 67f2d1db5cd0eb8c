// Fuzzes the CPU kernels without Python, to be run under sanitizers: every operation in every
// instruction set that this CPU has, with odd shapes, in memory that is not a byte too long, with
// one to eight threads; results are compared with what was computed in double, and between numbers
// of threads bit by bit. Exit status 0 and a line of counts if all is well.
//
//   test_cpu [rounds [first round [case]]]
//
// Each case has its own thread, so that scratch memory is as long as it needs and holds nothing
// from before.

#include <stdexcept>
#include <string>
#include <thread>

#include "cpu/isa.hpp"
#include "harness.hpp"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#include <sanitizer/common_interface_defs.h>
#define HAS_SANITIZER 1
#endif

// Memory that was never written holds NaN, in every type.
extern "C" const char* __asan_default_options() {
  return "malloc_fill_byte=255:max_malloc_fill_size=1073741824";
}
extern "C" const char* __tsan_default_options() { return "halt_on_error=1"; }

namespace fuzz {
namespace {

struct Kind {
  const char* name;
  void (*run)(Case&);
};

constexpr Kind kKinds[] = {
    {"rms_norm", rms_norm},
    {"add_rms_norm", add_rms_norm},
    {"silu_and_mul", silu_and_mul},
    {"rope_write", rope_write},
    {"linear", linear},
    {"linear", linear},
    {"embed", embed},
    {"gather_rows", gather_rows},
    {"attention", attention},
    {"sample", sample},
    {"pool", pool},
    {"callers", callers},
    {"plan", plan},
    {"collective", collective},
    {"lost_rank", lost_rank},
};

// What is at work, for print_case.
struct Current {
  std::string isa;
  const char* kind = "";
  long long round = 0;
  int threads = 1;
} current;

// The digest of a case with so many threads.
uint64_t run(const Kind& kind, uint64_t seed, int threads) {
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
  for (const Kind& kind : kKinds) {
    if (!only.empty() && only != kind.name) continue;
    current.kind = kind.name;
    const uint64_t seed = static_cast<uint64_t>(round) * 64 + static_cast<uint64_t>(&kind - kKinds);
    const uint64_t alone = run(kind, seed, 1);
    Case(0).check(run(kind, seed, 2 + static_cast<int>(round % 7)) == alone, "same bits");
  }
}

// Whether this machine has it.
bool use(const std::string& isa) {
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
  for (const char* isa : {"portable", "avx2", "avx512", "avx512_bf16"}) {
    if (!fuzz::use(isa)) continue;
    used += used.empty() ? isa : std::string(", ") + isa;
    for (int64_t round = first; round < first + rounds; ++round) {
      fuzz::run_round(round, argc > 3 ? argv[3] : "");
    }
  }
  std::printf("%lld rounds of the kernels in %s\n", static_cast<long long>(rounds), used.c_str());
  return 0;
}
