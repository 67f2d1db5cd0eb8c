// Estimates how long a step takes, from a table measured at start and from the steps since.
//
// The table holds steps alone, over short contexts. The excess over it depends on what is served:
// host work, attention over long contexts. It is tracked for each power of two of rows. The extra
// excess of steps with drafts is tracked apart, because a choice needs both and one kind of step
// may be rare. It fades, so drafts that once did not pay are tried again.

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
  // Points (tokens, time in any unit), ascending in both; linear between them and after the last.
  // Without points every step costs the same and nothing is learnt.
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

  // Time of a step of `rows` sequences and `tokens` tokens, `drafted` of them draft tokens.
  double estimate(int32_t rows, int32_t tokens, int32_t drafted) const {
    const Excess& excess = excess_[index(rows)];
    const double measured = costs_[static_cast<size_t>(tokens)];
    return std::max(measured + excess.all + (drafted > 0 ? excess.drafting : 0.0),
                    kFloor * measured);
  }

  // Records that such a step took `time`. The error is bounded: a step may be delayed by something
  // else.
  void record(int32_t rows, int32_t tokens, int32_t drafted, double time) {
    if (!learns_) return;
    const double expected = estimate(rows, tokens, drafted);
    const double error = std::clamp(time - expected, -kMaxError * expected, kMaxError * expected);
    Excess& excess = excess_[index(rows)];
    excess.drafting *= kFade;
    if (drafted > 0) {
      excess.drafting += kRate * error;
    } else {  // the first step corrects its whole error, the next half of its own, and so on
      excess.all += std::max(kRate, 1.0 / static_cast<double>(++excess.plain_steps)) * error;
    }
  }

  bool learns() const { return learns_; }

 private:
  static constexpr double kRate = 0.1;       // share of an error that is corrected at once
  static constexpr double kMaxError = 0.25;  // share of the estimate
  static constexpr double kFade = 0.9995;    // half in 1,400 steps
  static constexpr double kFloor = 0.1;      // least estimate, as a share of the measured time

  struct Excess {
    double all = 0.0;
    double drafting = 0.0;  // on top of `all`
    int64_t plain_steps = 0;
  };

  static size_t index(int32_t rows) { return std::bit_width(static_cast<uint32_t>(rows)); }

  bool learns_;
  std::vector<double> costs_;        // [max_tokens + 1], measured, by tokens
  std::array<Excess, 33> excess_{};  // by bits of the number of rows
};

}  // namespace s1
