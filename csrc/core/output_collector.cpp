#include "output_collector.hpp"

#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>

#include "core_output.hpp"

namespace s1 {

namespace {

// Views of the parts of a record.
struct Record {
  std::string_view head;
  std::string_view tokens;
  std::string_view marks;

  SeqId id() const { return read<SeqId>(0); }
  bool finished() const { return head[kRecordFinish] != static_cast<char>(FinishReason::kNone); }
  bool sampled() const {
    return std::none_of(marks.begin(), marks.end(), [](char mark) { return mark & kForced; });
  }
  size_t size() const { return head.size() + tokens.size() + marks.size(); }

  template <typename T>
  T read(size_t offset) const {
    T value;
    std::memcpy(&value, head.data() + offset, sizeof value);
    return value;
  }
};

// Parses the first of `records`. Throws std::invalid_argument if it is cut off.
Record parse_first(std::string_view records) {
  Record record;
  if (records.size() >= kRecordHead) {
    record.head = records.substr(0, kRecordHead);
    const size_t rest = records.size() - kRecordHead;
    const auto count = static_cast<size_t>(std::max(record.read<int32_t>(kRecordCount), 0));
    if (rest / (sizeof(TokenId) + 1) >= count) {
      record.tokens = records.substr(kRecordHead, count * sizeof(TokenId));
      record.marks = records.substr(kRecordHead + record.tokens.size(), count);
      return record;
    }
  }
  throw std::invalid_argument("a record is cut off");
}

}  // namespace

std::vector<int64_t> OutputCollector::add(std::string_view records) {
  std::vector<int64_t> urgent;
  while (!records.empty()) {
    const Record record = parse_first(records);
    records.remove_prefix(record.size());
    const int64_t number = record.id() >> sequence_bits_;
    const auto entry = requests_.find(number);
    if (entry == requests_.end()) continue;
    Request& request = entry->second;
    join(request.joined, {record.id(), std::string(record.head), std::string(record.tokens),
                          std::string(record.marks), record.sampled()});
    if (!request.begun || record.finished()) {
      urgent.push_back(number);
    } else if (!request.is_pending) {
      pending_.push_back(number);
      request.is_pending = true;
    }
    request.begun = true;
  }
  return urgent;
}

void OutputCollector::join(std::vector<Joined>& joined, Joined&& record) {
  const auto last = std::find_if(joined.rbegin(), joined.rend(),
                                 [&](const Joined& known) { return known.id == record.id; });
  if (last == joined.rend() || !last->sampled || !record.sampled) {
    joined.push_back(std::move(record));
    return;
  }
  record.head.replace(kRecordCached, sizeof(int32_t), last->head, kRecordCached, sizeof(int32_t));
  const size_t before = last->tokens.size();
  last->tokens += record.tokens;
  try {
    last->marks += record.marks;
  } catch (const std::bad_alloc&) {
    last->tokens.resize(before);
    throw;
  }
  last->head = std::move(record.head);
}

std::vector<int64_t> OutputCollector::pop_pending() {
  std::vector<int64_t> popped;
  popped.reserve(pending_.size());
  for (const int64_t number : pending_) {
    const auto entry = requests_.find(number);
    if (entry == requests_.end()) continue;
    entry->second.is_pending = false;
    popped.push_back(number);
  }
  pending_.clear();
  return popped;
}

std::string OutputCollector::collect(int64_t request) {
  std::string out;
  const auto entry = requests_.find(request);
  if (entry == requests_.end()) return out;
  for (const Joined& joined : entry->second.joined) {
    const auto count = static_cast<int32_t>(joined.marks.size());
    const size_t begin = out.size();
    out += joined.head;
    std::memcpy(out.data() + begin + kRecordCount, &count, sizeof count);
    out += joined.tokens;
    out += joined.marks;
  }
  entry->second.joined.clear();
  return out;
}

}  // namespace s1
