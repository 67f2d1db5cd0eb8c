// Fuzzes output records (csrc/core/core_output, output_collector): what is collected equals what
// was added, and records that are cut off or damaged are rejected or dropped without a read beyond
// them.

#include <map>
#include <random>

#include "core/output_collector.hpp"
#include "core/core_output.hpp"

namespace {

using s1::SeqId;
using s1::Sequence;

constexpr int32_t kBits = 3;

// The generated tokens of a sequence, as bytes.
std::string bytes_of(const Sequence& sequence) {
  const auto* begin = reinterpret_cast<const char*>(sequence.tokens.data() + sequence.prompt_len);
  return {begin, sizeof(s1::TokenId) * sequence.marks.size()};
}

// Appends the tokens of records to those of their sequences.
void parse(const std::string& records, std::map<SeqId, std::string>& tokens) {
  for (size_t at = 0; at < records.size();) {
    SeqId id = 0;
    int32_t count = 0;
    records.copy(reinterpret_cast<char*>(&id), sizeof id, at);
    records.copy(reinterpret_cast<char*>(&count), sizeof count, at + s1::kRecordCount);
    const size_t length = sizeof(s1::TokenId) * static_cast<size_t>(count);
    tokens[id] += records.substr(at + s1::kRecordHead, length);
    at += s1::kRecordHead + length + static_cast<size_t>(count);
  }
}

// Adds records from memory that ends where they end.
void add(s1::OutputCollector& collector, const std::string& records) {
  const std::vector<char> exact(records.begin(), records.end());
  collector.add({exact.data(), exact.size()});
}

// Adds damaged records: some are cut off, others have a wrong byte.
void add_damaged(std::string records, std::mt19937_64& random) {
  if (records.empty()) return;
  s1::OutputCollector collector(kBits);
  for (int64_t request = 0; request < 4; ++request) collector.open(request);
  if (random() % 2 == 0) records.resize(random() % records.size());
  if (!records.empty()) records[random() % records.size()] = static_cast<char>(random());
  try {
    add(collector, records);
  } catch (const std::invalid_argument&) {
  }
  for (int64_t request = 0; request < 4; ++request) collector.collect(request);
}

}  // namespace

void fuzz_output_collector(uint64_t seed) {
  std::mt19937_64 random(seed);
  s1::OutputCollector collector(kBits);
  std::vector<Sequence> sequences(12);
  std::map<SeqId, std::string> collected;
  for (size_t i = 0; i < sequences.size(); ++i) {
    sequences[i].id = static_cast<SeqId>(i % 4 << kBits | i / 4);
    sequences[i].tokens.assign(i, 1);
    sequences[i].prompt_len = sequences[i].num_settled = static_cast<int32_t>(i);
    if (i < 4) collector.open(static_cast<int64_t>(i));
  }
  for (int step = 0; step < 20; ++step) {
    std::string records;
    for (size_t i = 0; i < sequences.size(); ++i) {
      if (random() % 3 == 0) continue;
      for (uint64_t n = random() % 3; n > 0; --n) {
        sequences[i].append(static_cast<s1::TokenId>(random()),
                            random() % 4 == 0 ? s1::kForced : s1::kThink);
      }
      sequences[i].num_settled = sequences[i].num_tokens();
      s1::append_output(sequences[i], static_cast<int32_t>(i), records);
    }
    add(collector, records);
    add_damaged(records, random);
    if (random() % 2 == 0) parse(collector.collect(static_cast<int64_t>(random() % 4)), collected);
  }
  std::string rest;
  for (Sequence& sequence : sequences) s1::append_output(sequence, 0, rest);
  add(collector, rest);
  for (int64_t request = 0; request < 4; ++request) parse(collector.collect(request), collected);
  for (const Sequence& sequence : sequences) {
    s1::check_invariant(collected[sequence.id] == bytes_of(sequence), "the collector lost tokens");
  }
}
