#include "scheduled_batch.hpp"

#include <algorithm>

namespace s1 {

void ScheduledBatch::write(const StepPlan& plan, int32_t block_size) {
  num_tokens = num_rows = num_samples = num_banned = num_scored = 0;
  scored_spans.clear();
  max_seqlen_q = num_decode_rows = 0;
  table_rows.resize(static_cast<size_t>(max_rows));
  cu_seqlens_q[0] = 0;
  for (const PlannedRow& row : plan.rows) write_row(row, block_size);
}

void ScheduledBatch::write_row(const PlannedRow& row, int32_t block_size) {
  const Sequence& sequence = *row.sequence;
  const int32_t row_tokens = row.num_tokens();
  const BlockId* block = sequence.blocks.data() + sequence.num_computed / block_size;
  int32_t offset = sequence.num_computed % block_size;
  for (int32_t i = 0; i < row_tokens; ++i, ++offset) {
    if (offset == block_size) {
      ++block;
      offset = 0;
    }
    const int32_t position = sequence.num_computed + i;
    const int32_t token = num_tokens + i;
    input_ids[token] = i < row.num_scheduled
                           ? sequence.tokens[static_cast<size_t>(position)]
                           : row.draft[static_cast<size_t>(i - row.num_scheduled)].token;
    positions[token] = position;
    slot_mapping[token] = int64_t{*block} * block_size + offset;
  }
  write_scored(row, num_tokens);
  num_tokens += row_tokens;
  max_seqlen_q = std::max(max_seqlen_q, row_tokens);
  num_decode_rows += row_tokens == 1 && num_decode_rows == num_rows;
  context_lens[num_rows] = sequence.num_computed + row_tokens;
  write_block_table(num_rows, sequence);
  cu_seqlens_q[++num_rows] = num_tokens;
  write_samples(row);
}

void ScheduledBatch::write_block_table(int32_t row, const Sequence& sequence) {
  TableRow& written = table_rows[static_cast<size_t>(row)];
  if (written.admission != sequence.admission) written = {sequence.admission, 0, 0};
  int32_t* entries = block_table + static_cast<int64_t>(row) * max_blocks;
  std::copy(sequence.blocks.begin() + written.num_blocks, sequence.blocks.end(),
            entries + written.num_blocks);
  std::copy(sequence.blocks.begin() + written.num_expired,
            sequence.blocks.begin() + sequence.num_expired_blocks, entries + written.num_expired);
  written.num_blocks = static_cast<int32_t>(sequence.blocks.size());
  written.num_expired = sequence.num_expired_blocks;
}

// Each scored token predicts the prompt's token after it. `first_token`: of the row, in the step.
void ScheduledBatch::write_scored(const PlannedRow& row, int32_t first_token) {
  const Sequence& sequence = *row.sequence;
  const int32_t begin = std::max(sequence.num_computed, sequence.num_scored);
  const int32_t end = std::min(sequence.num_computed + row.num_scheduled, sequence.num_to_score);
  if (begin >= end) return;
  scored_spans.push_back({sequence.id, begin + 1, end - begin});
  for (int32_t position = begin; position < end; ++position) {
    scored_tokens[num_scored] = first_token + position - sequence.num_computed;
    scored_targets[num_scored++] = sequence.tokens[static_cast<size_t>(position) + 1];
  }
}

// The token after a draft token is sampled as if the draft token had been appended.
void ScheduledBatch::write_samples(const PlannedRow& row) {
  const Sequence& sequence = *row.sequence;
  BudgetState state = sequence.thinking;
  for (int32_t i = 0; i < row.num_samples; ++i) {
    const int32_t sample = num_samples++;
    const bool ends = state.phase != Phase::kThinking && sequence.bans_ends(i);
    const uint8_t banned = ends ? kBanEnds : ban_code(sequence.budget, state);
    sample_tokens[sample] = num_tokens - row.num_samples + i;
    sample_req_indices[sample] = sequence.req_index;
    sample_positions[sample] = sequence.num_tokens() + i;
    sample_banned[sample] = banned;
    num_banned += banned != 0;
    if (i < row.num_drafted) {
      advance(sequence.budget, state, row.draft[static_cast<size_t>(i)].token);
    }
  }
}

}  // namespace s1
