// How a plan becomes the flat arrays of batch.hpp.

#include "scheduled_batch.hpp"

#include <algorithm>

#include "scheduler.hpp"

namespace s1 {

void Scheduler::write_row(ScheduledBatch& batch, const Row& row) const {
  const Sequence& sequence = *row.sequence;
  const int32_t block_size = config_.block_size;
  const int32_t num_tokens = row.num_scheduled + row.num_drafted;
  for (int32_t i = 0; i < num_tokens; ++i) {
    const int32_t position = sequence.num_computed + i;
    const auto block =
        static_cast<int64_t>(sequence.blocks[static_cast<size_t>(position / block_size)]);
    const int32_t token = batch.num_tokens + i;
    batch.input_ids[token] = i < row.num_scheduled ? sequence.tokens[static_cast<size_t>(position)]
                                                   : guess(row, i - row.num_scheduled).token;
    batch.positions[token] = position;
    batch.slot_mapping[token] = block * block_size + position % block_size;
  }
  batch.num_tokens += num_tokens;
  batch.max_seqlen_q = std::max(batch.max_seqlen_q, num_tokens);
  batch.context_lens[batch.num_rows] = sequence.num_computed + num_tokens;
  write_table(batch, batch.num_rows, sequence);
  batch.cu_seqlens_q[++batch.num_rows] = batch.num_tokens;
  write_samples(batch, row);
}

void Scheduler::write_table(ScheduledBatch& batch, int32_t index, const Sequence& sequence) const {
  ScheduledBatch::TableRow& row = batch.table_rows[static_cast<size_t>(index)];
  if (row.admission != sequence.admission) row = {sequence.admission, 0};
  const auto num_blocks = static_cast<int32_t>(sequence.blocks.size());
  int32_t* entries = batch.block_table + static_cast<int64_t>(index) * batch.max_blocks;
  std::copy(sequence.blocks.begin() + row.num_blocks, sequence.blocks.end(),
            entries + row.num_blocks);
  row.num_blocks = num_blocks;
}

// What follows a drafted token is sampled as if it had been appended.
void Scheduler::write_samples(ScheduledBatch& batch, const Row& row) const {
  const Sequence& sequence = *row.sequence;
  BudgetState state = sequence.thinking;
  for (int32_t i = 0; i < row.samples; ++i) {
    const int32_t sample = batch.num_samples++;
    const bool banned = bans_triggers(sequence.budget, state);
    batch.sample_tokens[sample] = batch.num_tokens - row.samples + i;
    batch.sample_req_indices[sample] = sequence.req_index;
    batch.sample_positions[sample] = sequence.num_tokens() + i;
    batch.sample_banned[sample] = banned;
    batch.num_banned += banned;
    state.banned = false;
    ++state.thinking_tokens;
  }
}

}  // namespace s1
