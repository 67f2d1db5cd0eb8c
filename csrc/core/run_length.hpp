// How many steps the device takes ahead of the host, by time.
//
// What is in flight delays all that the host decides next: the admission of a request, an abort, a
// deadline, and the tokens that a reader waits for. So the work in flight is bounded in time; the
// bound is looser while nothing of this is awaited. Does not know sequences.

#pragma once

#include <algorithm>
#include <cstdint>

namespace s1 {

class RunLength {
 public:
  // Launches in flight: the device computes one while the host applies the one before.
  static constexpr double kLaunches = 2.0;
  // The bound while nothing is awaited, as a multiple of `max_time`.
  static constexpr double kUnawaited = 4.0;

  // `max_time`: of the steps in flight while a reader, a deadline or a request waits. 0: no bound.
  explicit RunLength(double max_time) : max_time_(max_time) {}

  // Steps of the next launch, from 1 to `limit`. `step_time`: of one step; 0: not measured yet, so
  // the launch is one step.
  int32_t num_steps(double step_time, bool awaited, int32_t limit) const {
    if (max_time_ <= 0.0) return limit;
    if (step_time <= 0.0) return 1;
    const double launch_time = max_time_ * (awaited ? 1.0 : kUnawaited) / kLaunches;
    return static_cast<int32_t>(std::clamp(launch_time / step_time, 1.0, double(limit)));
  }

 private:
  double max_time_;
};

}  // namespace s1
