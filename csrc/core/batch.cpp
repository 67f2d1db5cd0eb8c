// How a plan becomes the flat arrays of batch.hpp.

#include "batch.hpp"

#include <algorithm>

#include "scheduler.hpp"

namespace s1 {

void Scheduler::write_row(ScheduledBatch& batch, const Row& row) const {
  const Sequence& sequence = *row.sequence;
  const int32_t block_size = config_.block_size;
  for (int32_t i = 0; i < row.num_scheduled; ++i) {
    const int32_t position = sequence.num_computed + i;
    const auto block =
        static_cast<int64_t>(sequence.blocks[static_cast<size_t>(position / block_size)]);
    const int32_t token = batch.num_tokens + i;
    batch.input_ids[token] = sequence.tokens[static_cast<size_t>(position)];
    batch.positions[token] = position;
    batch.slot_mapping[token] = block * block_size + position % block_size;
  }
  batch.num_tokens += row.num_scheduled;
  batch.max_seqlen_q = std::max(batch.max_seqlen_q, row.num_scheduled);
  batch.context_lens[batch.num_rows] = sequence.num_computed + row.num_scheduled;
  write_table(batch, batch.num_rows, sequence);
  batch.cu_seqlens_q[++batch.num_rows] = batch.num_tokens;
  if (row.samples) write_sample(batch, sequence);
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

void Scheduler::write_sample(ScheduledBatch& batch, const Sequence& sequence) const {
  const int32_t sample = batch.num_samples++;
  const bool banned = bans_triggers(sequence.budget, sequence.thinking);
  batch.sample_tokens[sample] = batch.num_tokens - 1;
  batch.sample_seats[sample] = sequence.seat;
  batch.sample_positions[sample] = sequence.num_tokens();
  batch.sample_banned[sample] = banned;
  batch.num_banned += banned;
}

}  // namespace s1
