// Which blocks of a sequence serve no layer any more, if every layer has a sliding window.
//
// A query at position p sees the keys p - W + 1 .. p, for the largest window W. Queries only move
// forward, so blocks whose every key lies before the window of the next query are free for others.

#pragma once

#include <algorithm>
#include <cstdint>

namespace s1 {

struct SlidingWindow {
  int32_t size = 0;             // W; 0: some layer sees every key, so no block expires
  int32_t block_size = 0;       // tokens
  int32_t max_step_tokens = 0;  // of one sequence

  // Leading blocks that no query from `position` on sees.
  int32_t num_expired(int32_t position) const {
    return size == 0 ? 0 : std::max(position - size + 1, 0) / block_size;
  }

  // Most blocks that a sequence holds at a time up to a length of `num_tokens`, while it computes
  // up to `num_pending` tokens a step. The window of a step's first token and the step itself are
  // an interval of the sequence, which may begin at the end of a block.
  int32_t max_blocks(int32_t num_tokens, int32_t num_pending) const {
    const int32_t all = (num_tokens + block_size - 1) / block_size;
    if (size == 0) return all;
    const int64_t interval = int64_t{size} - 1 + std::min(num_pending, max_step_tokens);
    return static_cast<int32_t>(
        std::min<int64_t>(all, (interval + block_size - 2) / block_size + 1));
  }
};

}  // namespace s1
