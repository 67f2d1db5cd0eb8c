// One step as flat arrays, in buffers that the caller owns and reuses.
//
// A row is a sequence with one or more pending tokens; a row that samples has one entry of the
// sample arrays per sample. Tensors over these buffers are created once, so a step allocates
// nothing. Knows the layout, not why a row was planned.

#pragma once

#include <vector>

#include "step_plan.hpp"
#include "types.hpp"

namespace s1 {

struct ScheduledBatch {
  // Consecutive prompt tokens of a sequence that the step scores.
  struct ScoredSpan {
    SeqId id = 0;
    int32_t first = 0;  // position of the first target
    int32_t count = 0;
  };
  // What a row of block_table holds, so that only changed entries are written.
  struct TableRow {
    uint64_t admission = 0;
    int32_t num_blocks = 0;
    int32_t num_expired = 0;
  };

  // Capacities: T tokens, B rows, M blocks of the longest sequence, S samples.
  int32_t max_tokens = 0;   // T
  int32_t max_rows = 0;     // B
  int32_t max_blocks = 0;   // M
  int32_t max_samples = 0;  // S, at least B; more if sequences sample several tokens

  int32_t* input_ids = nullptr;           // [T]
  int32_t* positions = nullptr;           // [T] position of the token in its sequence
  int64_t* slot_mapping = nullptr;        // [T] block * block_size + offset
  int32_t* cu_seqlens_q = nullptr;        // [B + 1] first token of each row
  int32_t* context_lens = nullptr;        // [B] tokens in the cache after the step
  int32_t* block_table = nullptr;         // [B, M] entries beyond the context keep old values
  int32_t* sample_tokens = nullptr;       // [S] index into T of the token whose logits are sampled
  int32_t* sample_req_indices = nullptr;  // [S] row of the persistent batch
  int64_t* sample_positions = nullptr;    // [S] position in its sequence of the token to sample
  int32_t* scored_tokens = nullptr;       // [T] index into T of a token whose logits score another
  int64_t* scored_targets = nullptr;      // [T] that one: the prompt's next token
  uint8_t* sample_banned = nullptr;       // [S] ban_code() or kBanEnds (budget.hpp)

  int32_t num_tokens = 0;
  int32_t num_rows = 0;
  int32_t num_samples = 0;
  int32_t num_banned = 0;
  int32_t num_scored = 0;
  int32_t max_seqlen_q = 0;
  int32_t num_decode_rows = 0;  // at the beginning, of one token each
  std::vector<TableRow> table_rows;
  std::vector<ScoredSpan> scored_spans;  // in the order of scored_tokens

  // Overwrites the batch with the rows of `plan`, in their order.
  void write(const StepPlan& plan, int32_t block_size);

  // Appends the blocks that the sequence gained since this row of block_table was written, and puts
  // the null block in place of the expired ones.
  void write_block_table(int32_t row, const Sequence& sequence);

 private:
  void write_row(const PlannedRow& row, int32_t block_size);
  void write_samples(const PlannedRow& row);
  void write_scored(const PlannedRow& row, int32_t first_token);
};

}  // namespace s1
