#include "core_output.hpp"

#include <algorithm>
#include <bit>

namespace s1 {

static_assert(std::endian::native == std::endian::little, "records are little-endian");

namespace {

template <typename T>
void append_bytes(std::string& out, const T* values, size_t count) {
  out.append(reinterpret_cast<const char*>(values), count * sizeof(T));
}

}  // namespace

size_t output_size(const Sequence& sequence) {
  const int32_t count = sequence.num_settled - sequence.prompt_len - sequence.num_collected;
  return kRecordHead + static_cast<size_t>(count) * (sizeof(TokenId) + 1);
}

void append_output(Sequence& sequence, int32_t req_index, std::string& out) {
  out.reserve(out.size() + output_size(sequence));
  const auto first = static_cast<size_t>(sequence.num_collected);
  const auto count = static_cast<size_t>(sequence.num_settled - sequence.prompt_len) - first;
  sequence.num_collected += static_cast<int32_t>(count);
  const BudgetState& thinking = sequence.thinking;
  const int32_t numbers[] = {req_index,
                             static_cast<int32_t>(count),
                             thinking.thinking_tokens,
                             thinking.max_thinking,
                             thinking.waits_used,
                             std::max(sequence.num_cached, 0)};
  const uint8_t states[] = {
      static_cast<uint8_t>(thinking.phase), static_cast<uint8_t>(sequence.finish_reason),
      static_cast<uint8_t>(thinking.end_reason), static_cast<uint8_t>(thinking.held)};
  append_bytes(out, &sequence.id, 1);
  append_bytes(out, numbers, std::size(numbers));
  append_bytes(out, states, std::size(states));
  append_bytes(out, sequence.tokens.data() + sequence.prompt_len + first, count);
  append_bytes(out, sequence.marks.data() + first, count);
}

}  // namespace s1
