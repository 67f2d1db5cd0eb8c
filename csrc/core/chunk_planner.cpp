#include "chunk_planner.hpp"

#include <algorithm>
#include <limits>

namespace s1 {

namespace {

constexpr double kUnlimited = std::numeric_limits<double>::infinity();
constexpr double kMargin = 0.9;     // share of the limit that is planned
constexpr double kRate = 0.2;       // share of an error that is corrected at once
constexpr double kMaxRise = 2.0;    // a measurement counts as at most so many times the estimate
constexpr double kFade = 0.05;      // share of an excess over smaller chunks that a step forgets
constexpr double kMinShare = 0.05;  // of a step's time, that its chunks took at least

}  // namespace

void ChunkPlanner::Estimate::record(double measured) {
  if (value > 0.0) measured = std::min(measured, kMaxRise * value);
  ++count;
  value += std::max(kRate, 1.0 / count) * (measured - value);
}

// The measured entry closest below `index`, else the closest above; null if there is none.
const ChunkPlanner::Estimate* ChunkPlanner::nearest(const Table& table, size_t index) {
  for (size_t i = index + 1; i-- > 0;) {
    if (table[i].count > 0) return &table[i];
  }
  for (size_t i = index + 1; i < table.size(); ++i) {
    if (table[i].count > 0) return &table[i];
  }
  return nullptr;
}

double ChunkPlanner::decode_time(int32_t rows) const {
  const Estimate* estimate = nearest(decode_, half_bits(rows));
  return estimate == nullptr ? 0.0 : estimate->value;
}

// Time per token of a chunk; infinite if it is more than one power of two above all measured ones.
double ChunkPlanner::token_time(int32_t context, int32_t tokens) const {
  const size_t size = bits(tokens);
  const size_t middle = half_bits(context + tokens / 2);
  for (size_t smaller = size + 1; smaller-- > 0;) {
    const Estimate* estimate = nearest(per_token_[smaller], middle);
    if (estimate == nullptr) continue;
    return size - smaller > 1 ? kUnlimited : estimate->value;
  }
  for (size_t larger = size + 1; larger < kBits; ++larger) {
    const Estimate* estimate = nearest(per_token_[larger], middle);
    if (estimate != nullptr) return estimate->value;
  }
  return kUnlimited;
}

// Estimated time of the plan's rows with one token. Even a step without any reads all weights.
double ChunkPlanner::base_time(const StepPlan& plan) const {
  const auto chunks = std::count_if(plan.rows.begin(), plan.rows.end(), is_chunk);
  return decode_time(std::max(plan.num_rows() - static_cast<int32_t>(chunks), 1));
}

// Time for further chunks.
double ChunkPlanner::time_left(const StepPlan& plan) const {
  const bool awaited = std::any_of(plan.rows.begin(), plan.rows.end(), [](const PlannedRow& row) {
    return row.sequence->interactive && row.num_samples > 0;
  });
  const double limit = std::min(awaited ? max_step_time_ : kUnlimited,
                                std::max(time_to_deadline_, max_step_time_ / 2));
  if (limit == kUnlimited) return limit;
  double time = kMargin * limit - base_time(plan);
  for (const PlannedRow& row : plan.rows) {
    if (is_chunk(row)) time -= chunk_time(row.context, row.num_scheduled);
  }
  return time;
}

bool ChunkPlanner::has_room(const StepPlan& plan) const {
  if (max_step_time_ <= 0.0) return true;
  const bool has_chunk = std::any_of(plan.rows.begin(), plan.rows.end(), [](const auto& row) {
    return row.num_scheduled >= kMinChunk;
  });
  if (!has_chunk) return true;
  const double left = time_left(plan);
  return left == kUnlimited || chunk_time(0, kMinChunk) <= left;
}

int32_t ChunkPlanner::chunk_size(const StepPlan& plan, int32_t context, int32_t limit) const {
  if (max_step_time_ <= 0.0 || limit <= kMinChunk) return limit;
  const double left = time_left(plan);
  if (left == kUnlimited || chunk_time(context, limit) <= left) return limit;
  int32_t size = kMinChunk;
  while (size + kMinChunk < limit && chunk_time(context, size + kMinChunk) <= left) {
    size += kMinChunk;
  }
  return size;
}

// What a step took beyond its decodes is shared among its chunks as the estimates say.
void ChunkPlanner::record_step_time(const StepPlan& plan, double time) {
  if (plan.rows.empty()) return;
  double expected = 0.0;
  int32_t tokens = 0;
  for (const PlannedRow& row : plan.rows) {
    if (!is_chunk(row)) continue;
    tokens += row.num_scheduled;
    expected += chunk_time(row.context, row.num_scheduled);
  }
  if (tokens == 0) {
    record_decode_time(plan.num_rows(), time);
    return;
  }
  const double extra = std::max(time - base_time(plan), kMinShare * time);
  for (const PlannedRow& row : plan.rows) {
    if (!is_chunk(row)) continue;
    const double before = token_time(row.context, row.num_scheduled);
    const double measured = expected < kUnlimited ? before * extra / expected : extra / tokens;
    const size_t middle = half_bits(row.context + row.num_scheduled / 2);
    Estimate& own = per_token_[bits(row.num_scheduled)][middle];
    own.record(measured);
    // A larger chunk that seemed slower per token is tried again after some steps.
    Table& larger = per_token_[std::min(bits(row.num_scheduled) + 1, kBits - 1)];
    for (size_t i = 0; i <= middle; ++i) {
      if (larger[i].value > own.value) larger[i].value += kFade * (own.value - larger[i].value);
    }
  }
}

}  // namespace s1
