// How many prompt tokens join a step, so that it is short while a reader or a deadline waits for
// its end.
//
// Learns from the steps themselves: the time of steps that only decode, by rows, and on top of it
// the time of one prompt token, by the size of its chunk (in powers of two) and by the context in
// its middle (in half powers of two), so attention and the speed of kernels need no formula. A cell
// that was never measured borrows from a smaller one, and chunks at most double until they are
// measured.
// Before anything is known, a chunk is the smallest.
//
// A step that something else delayed corrects an estimate upwards by a bounded factor; a step that
// was faster than estimated is believed, because nothing makes a step too fast.
//
// Does not know blocks, or sequences beyond the rows of the plan.

#pragma once

#include <array>
#include <bit>

#include "step_plan.hpp"

namespace s1 {

class ChunkPlanner {
 public:
  // Tokens of the smallest chunk: one is computed in every step, so that no prompt starves.
  static constexpr int32_t kMinChunk = 16;

  // `max_step_time`: of a step that a reader or a deadline waits for, in the unit of
  // record_step_time(). 0: no limit, but step times are still learnt.
  explicit ChunkPlanner(double max_step_time) : max_step_time_(max_step_time) {}

  // Begins the plan of a step. It should end within `time_to_deadline`, or within half the maximum
  // if that is later, so that dense deadlines leave the chunks a fair size.
  void begin(double time_to_deadline) { time_to_deadline_ = time_to_deadline; }

  // True if another chunk may join the plan.
  bool has_room(const StepPlan& plan) const;

  // Size of a chunk that joins the plan, at most `limit` and at least min(kMinChunk, limit).
  // `context`: tokens before it.
  int32_t chunk_size(const StepPlan& plan, int32_t context, int32_t limit) const;

  // Learns from the time of the finished step of `plan`.
  void record_step_time(const StepPlan& plan, double time);

  // Learns the time of one decode step of `rows` rows.
  void record_decode_time(int32_t rows, double time) { decode_[half_bits(rows)].record(time); }

  // Estimated time of a step that decodes `rows` rows; 0 if no step was measured.
  double decode_time(int32_t rows) const;

 private:
  struct Estimate {
    double value = 0.0;
    int32_t count = 0;  // of measurements

    void record(double measured);
  };
  static constexpr size_t kBits = 32;
  using Table = std::array<Estimate, 2 * kBits>;

  static size_t bits(int32_t n) { return std::bit_width(static_cast<uint32_t>(n)); }
  static size_t half_bits(int32_t n) {
    const size_t b = bits(n);
    return b < 2 ? 2 * b : 2 * b + ((static_cast<size_t>(n) >> (b - 2)) & 1);
  }
  static bool is_chunk(const PlannedRow& row) { return row.num_scheduled > 1; }
  static const Estimate* nearest(const Table& table, size_t index);

  double time_left(const StepPlan& plan) const;
  double token_time(int32_t context, int32_t tokens) const;
  double chunk_time(int32_t context, int32_t tokens) const {
    return tokens * token_time(context, tokens);
  }
  double base_time(const StepPlan& plan) const;

  double max_step_time_;
  double time_to_deadline_ = 0.0;
  Table decode_{};                        // time of a step, by half bits of its rows
  std::array<Table, kBits> per_token_{};  // by bits of the size, then half bits of the middle
};

}  // namespace s1
