// Blocks that admission keeps free for the growth of running sequences.
//
// Their budgets bound how much they may still add; a share of that is kept free. The share doubles
// in a step that preempts and shrinks a little with each sequence that ends: 44 ends undo one
// doubling.

#pragma once

#include <algorithm>
#include <cmath>

#include "block_manager.hpp"

namespace s1 {

class GrowthReserve {
 public:
  // `min_share` in [0, 1]; with 1 nothing is preempted while answers stay typical.
  GrowthReserve(double min_share, const BlockManager& blocks)
      : min_share_(min_share), share_(std::max(min_share, kFirstShare)), blocks_(blocks) {}

  // Blocks to keep free for a sequence once all its tokens have blocks.
  int32_t growth_blocks(const Sequence& sequence) const {
    const auto growth = static_cast<int32_t>(std::ceil(share_ * sequence.expected_growth()));
    return max_blocks(sequence, sequence.num_tokens() + growth) -
           max_blocks(sequence, sequence.num_tokens());
  }

  // The same, and the blocks that its present tokens still lack.
  int32_t missing_blocks(const Sequence& sequence) const {
    const int32_t missing =
        max_blocks(sequence, sequence.num_tokens()) - sequence.num_held_blocks();
    return growth_blocks(sequence) + std::max(missing, 0);
  }

  void record_preemption() { share_ = std::min(share_ * kGrowth, 1.0); }
  void record_end() { share_ = std::max(share_ * kDecay, min_share_); }

 private:
  int32_t max_blocks(const Sequence& sequence, int32_t num_tokens) const {
    return blocks_.max_blocks(sequence, num_tokens, sequence.num_pending());
  }

  static constexpr double kFirstShare = 0.25;
  static constexpr double kGrowth = 2.0;
  static constexpr double kDecay = 63.0 / 64.0;

  double min_share_;
  double share_;
  const BlockManager& blocks_;
};

}  // namespace s1
