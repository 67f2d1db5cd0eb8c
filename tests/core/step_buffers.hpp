// A ScheduledBatch and its memory.

#pragma once

#include <vector>

#include "core/scheduled_batch.hpp"

namespace s1_test {

struct StepBuffers {
  std::vector<int32_t> input_ids, positions, cu_seqlens_q, context_lens, block_table;
  std::vector<int32_t> sample_tokens, sample_req_indices;
  std::vector<int64_t> slot_mapping, sample_positions;
  std::vector<uint8_t> sample_banned;
  std::vector<int32_t> scored_tokens;
  std::vector<int64_t> scored_targets;
  s1::ScheduledBatch batch;

  StepBuffers(int32_t tokens, int32_t rows, int32_t blocks, int32_t samples) {
    batch.max_tokens = tokens;
    batch.max_samples = samples;
    batch.max_rows = rows;
    batch.max_blocks = blocks;
    const auto allocate = [](auto& buffer, int32_t size) {
      buffer.resize(static_cast<size_t>(size));
      return buffer.data();
    };
    batch.input_ids = allocate(input_ids, tokens);
    batch.positions = allocate(positions, tokens);
    batch.slot_mapping = allocate(slot_mapping, tokens);
    batch.cu_seqlens_q = allocate(cu_seqlens_q, rows + 1);
    batch.context_lens = allocate(context_lens, rows);
    batch.block_table = allocate(block_table, rows * blocks);
    batch.sample_tokens = allocate(sample_tokens, samples);
    batch.sample_req_indices = allocate(sample_req_indices, samples);
    batch.sample_positions = allocate(sample_positions, samples);
    batch.sample_banned = allocate(sample_banned, samples);
    batch.scored_tokens = allocate(scored_tokens, tokens);
    batch.scored_targets = allocate(scored_targets, tokens);
  }
};

}  // namespace s1_test
