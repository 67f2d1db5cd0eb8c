// Output records: what sequences gained since their last record, as bytes that may leave the
// process.
//
// One record per sequence, little-endian, without padding. A reader needs nothing else to produce
// text from it:
//
//   int64   id
//   int32   req_index in the step, number of tokens k, thinking tokens, effective maximum,
//           waits used, prompt tokens found in the cache
//   uint8   phase, finish reason, end reason, held tokens (budget.hpp), which are not in the record
//   int32   token ids [k]
//   uint8   marks [k]

#pragma once

#include <string>

#include "sequence.hpp"

namespace s1 {

// Offsets in a record, in bytes.
inline constexpr size_t kRecordCount = sizeof(SeqId) + sizeof(int32_t);
inline constexpr size_t kRecordCached = sizeof(SeqId) + 5 * sizeof(int32_t);
inline constexpr size_t kRecordFinish = sizeof(SeqId) + 6 * sizeof(int32_t) + 1;
inline constexpr size_t kRecordHead = kRecordFinish + 3;

// Bytes of the record of `sequence`.
size_t output_size(const Sequence& sequence);

// Appends the record of `sequence` to `out`, and marks its tokens as collected. Changes nothing if
// memory runs out.
void append_output(Sequence& sequence, int32_t req_index, std::string& out);

}  // namespace s1
