// What drafts may still lose, in time: however bad they are, and however wrong it is what steps are
// said to take, a workload loses little by them.
//
// Time that passes adds a share of itself; a step with drafts adds what it saved or takes what it
// lost, and none is planned that could lose more than there is if every guess were wrong. There is
// never more than two steps' worth, so good times pay for no more than these of bad ones.

#pragma once

#include <algorithm>

namespace s1 {

class RegretBudget {
 public:
  // Before anything is known: one step of the shortest kind.
  explicit RegretBudget(double shortest_step) : left_(shortest_step) {}

  bool covers(double loss) const { return loss <= left_; }

  // A step took `time`, of which drafts saved `saved`, negative if they lost; without them it would
  // have taken `plain`. What held up the whole machine is not all theirs, so a loss has its limit.
  void settle(double time, double plain, double saved) {
    const double most = kMostSteps * plain;
    left_ = std::min(left_ + kShare * time + std::max(saved, -most), most);
  }

 private:
  static constexpr double kShare = 0.02;  // of all time; the promise is 0.03
  static constexpr double kMostSteps = 2.0;

  double left_;
};

}  // namespace s1
