// How much time drafts may still lose. It bounds the regret against decoding without drafts: a
// workload loses little, however bad the drafts are and however wrong the estimated step costs.
//
// Every step adds a share of its time. A step with drafts also adds the time that they saved, or
// subtracts what they lost. No step is planned that could lose more than is left if every draft
// token were rejected. The budget never exceeds two steps, so good times pay for at most two bad
// steps.

#pragma once

#include <algorithm>

namespace s1 {

class RegretBudget {
 public:
  // `shortest_step`: the initial budget, before anything is known.
  explicit RegretBudget(double shortest_step) : left_(shortest_step) {}

  bool covers(double loss) const { return loss <= left_; }

  // Accounts for a step that took `time`. `saved`: by drafts, negative if they lost; `plain`: time
  // of the step without them. A loss is limited, because a delay of the whole machine is not
  // caused by drafts alone.
  void record_step(double time, double plain, double saved) {
    const double limit = kMaxSteps * plain;
    left_ = std::min(left_ + kShare * time + std::max(saved, -limit), limit);
  }

 private:
  static constexpr double kShare = 0.02;  // of all time; the promise is 0.03
  static constexpr double kMaxSteps = 2.0;

  double left_;
};

}  // namespace s1
