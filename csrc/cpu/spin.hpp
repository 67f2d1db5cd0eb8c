// Spinning for an event of another thread that is expected sooner than a sleep would end.

#pragma once

#include <chrono>

namespace s1::cpu {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");  // `yield` does nothing on most of these CPUs
#endif
}

// Spins until `done()` or for `limit`; returns the last value of done().
template <typename Done>
bool spin_until(const Done& done, std::chrono::nanoseconds limit) {
  const auto deadline = std::chrono::steady_clock::now() + limit;
  while (!done()) {
    for (int i = 0; i < 8; ++i) relax();
    if (std::chrono::steady_clock::now() >= deadline) return done();
  }
  return true;
}

}  // namespace s1::cpu
