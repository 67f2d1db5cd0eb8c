// What a step takes, by the number of its tokens: measured before the first, corrected by those
// that were taken since.
//
// The points are of steps alone, over short contexts. What comes on top depends on what is served:
// host work, attention over contexts as long as they are. It is followed for each magnitude of
// rows, and what a step with drafts takes beyond that apart from it: both are needed for a choice,
// and where one kind of step is never taken, nothing is known of it. So the difference fades, and
// what was once found not to pay is tried again.

#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <span>
#include <utility>
#include <vector>

#include "types.hpp"

namespace s1 {

class StepCost {
 public:
  // Points (tokens, time in any unit), ascending in both; straight lines between them, and beyond
  // the last the last line goes on. With none, every step takes the same, whatever it took.
  StepCost(std::span<const std::pair<int32_t, double>> points, int32_t max_tokens)
      : learns_(!points.empty()) {
    costs_.assign(static_cast<size_t>(max_tokens) + 1, points.empty() ? 1.0 : points[0].second);
    for (size_t i = 1; i < points.size(); ++i) {
      const auto [from, begin] = points[i - 1];
      const auto [to, end] = points[i];
      const bool last = i + 1 == points.size();
      for (int32_t n = from; n <= (last ? max_tokens : std::min(to, max_tokens)); ++n) {
        costs_[static_cast<size_t>(n)] = begin + (end - begin) * (n - from) / (to - from);
      }
    }
  }

  // Of a step of `rows` sequences and `tokens` tokens, `drafted` of them drafted.
  double of(int32_t rows, int32_t tokens, int32_t drafted) const {
    const Excess& excess = at(rows);
    const double least = costs_[static_cast<size_t>(tokens)];
    return std::max(least + excess.all + (drafted > 0 ? excess.drafting : 0.0), kFloor * least);
  }

  // Such a step took `time`. One that was held up by something else counts as a little longer.
  void learn(int32_t rows, int32_t tokens, int32_t drafted, double time) {
    if (!learns_) return;
    const double told = of(rows, tokens, drafted);
    const double error = std::clamp(time - told, -kMost * told, kMost * told);
    Excess& excess = excess_[index(rows)];
    excess.drafting *= kFade;
    if (drafted > 0) {
      excess.drafting += kRate * error;
    } else {  // the first corrects all of its error, the next half of its own, ...
      excess.all += std::max(kRate, 1.0 / static_cast<double>(++excess.plain_steps)) * error;
    }
  }

  bool learns() const { return learns_; }

 private:
  static constexpr double kRate = 0.1;     // of an error is corrected at once
  static constexpr double kMost = 0.25;    // of what was told is the largest error
  static constexpr double kFade = 0.9995;  // half in 1,400 steps
  static constexpr double kFloor = 0.1;    // of what was measured, whatever is learnt

  struct Excess {
    double all = 0.0;
    double drafting = 0.0;  // on top
    int64_t plain_steps = 0;
  };

  static size_t index(int32_t rows) { return std::bit_width(static_cast<uint32_t>(rows)); }
  const Excess& at(int32_t rows) const { return excess_[index(rows)]; }

  bool learns_;
  std::vector<double> costs_;        // by tokens
  std::array<Excess, 33> excess_{};  // by bits of the number of rows
};

}  // namespace s1
