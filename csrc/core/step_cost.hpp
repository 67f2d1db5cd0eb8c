// What a step takes, by the number of its tokens: measured points, straight lines between them.

#pragma once

#include <algorithm>
#include <span>
#include <utility>
#include <vector>

#include "types.hpp"

namespace s1 {

class StepCost {
 public:
  // Points (tokens, time in any unit), ascending in both. With none, every step takes the same;
  // beyond the last, the last line goes on.
  StepCost(std::span<const std::pair<int32_t, double>> points, int32_t max_tokens) {
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

  double of(int32_t tokens) const { return costs_[static_cast<size_t>(tokens)]; }

 private:
  std::vector<double> costs_;  // by tokens
};

}  // namespace s1
