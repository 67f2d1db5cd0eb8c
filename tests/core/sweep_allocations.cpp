// Lets every allocation of the core fail, one after another: std::bad_alloc leaves a state in which
// the same call, or the step after cancel_step(), gives the same tokens.
//
// A scenario is run once undisturbed, then once for each of its allocations n: the n-th fails, and
// in every second run all after it too, until the call has ended. Afterwards every sequence has the
// tokens of the undisturbed run, each was collected once, each end was reported, and all blocks are
// free. Sanitizers see leaks and dangling pointers.

#include <cstdio>
#include <cstdlib>
#include <map>
#include <new>
#include <optional>
#include <set>
#include <vector>

#include "core/core_output.hpp"
#include "core/output_collector.hpp"
#include "core/scheduler.hpp"
#include "step_buffers.hpp"

namespace {

// Allocations until one fails; negative: none does.
int64_t g_countdown = -1;
bool g_all_fail = false;  // those after it too
bool g_failed = false;    // one has failed

void* allocate(size_t size) {
  if (g_countdown >= 0 && g_countdown-- == 0) {
    if (g_all_fail) g_countdown = 0;
    g_failed = true;
    throw std::bad_alloc();
  }
  void* memory = std::malloc(size == 0 ? 1 : size);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

void* operator new(size_t size) { return allocate(size); }
void* operator new[](size_t size) { return allocate(size); }
void* operator new(size_t size, const std::nothrow_t&) noexcept try {
  return allocate(size);
} catch (const std::bad_alloc&) {
  return nullptr;
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, size_t) noexcept { std::free(memory); }

namespace {

using s1::Scheduler;
using s1::SeqId;
using s1::TokenId;

constexpr TokenId kVocab = 12;
constexpr TokenId kEos = 1;
constexpr TokenId kTrigger = 2;
constexpr int32_t kMultiSteps = 4;
constexpr int32_t kSequenceBits = 0;

struct Scenario {
  const char* name;
  s1::SchedulerConfig config;
  bool thinks = false;
  bool multi_step = false;
  bool pins = false;
};

// Runs one scenario. The allocation `fail_at`, counted over all calls of the core, fails.
class Run {
 public:
  Run(const Scenario& scenario, int64_t fail_at, bool all_fail)
      : scenario_(scenario),
        scheduler_(scenario.config),
        buffers_(scenario.config.max_num_batched_tokens, scenario.config.max_num_seqs,
                 scenario.config.num_blocks, scenario.config.max_samples),
        left_(fail_at),
        all_fail_(all_fail) {
    format_->triggers = {kTrigger, kEos};
    format_->natural_end = {kTrigger, 7};
    format_->newline = {3};
    format_->ends_in_newline.assign(kVocab, 0);
  }

  // False if the scenario has no allocation `fail_at`.
  bool failed() const { return failed_; }
  // Of each sequence, as collected.
  const std::map<SeqId, std::vector<TokenId>>& tokens() const { return tokens_; }

  void run() {
    if (scenario_.pins) restore_prefix();
    for (SeqId id = 0; id < 6 || scheduler_.has_unfinished();) {
      if (id < 6) add(id++);
      step();
      scheduler_.check_integrity();
    }
    for (SeqId id : known_) {
      s1::check_invariant(ended_.contains(id), "an end was never reported");
      attempt([&] { scheduler_.remove(id); });
      scheduler_.unpin(id);
    }
    scheduler_.unpin(kPin);
    s1::check_invariant(scheduler_.stats().num_free_blocks == scenario_.config.num_blocks,
                        "a block was lost");
  }

 private:
  static constexpr SeqId kPin = 99;

  // Calls the core. Returns false if an allocation failed.
  template <typename Call>
  bool try_once(const Call& call) {
    g_all_fail = all_fail_;
    g_failed = false;
    g_countdown = failed_ ? -1 : left_;
    bool returned = true;
    try {
      call();
    } catch (const std::bad_alloc&) {
      returned = false;
    }
    left_ = g_countdown;
    g_countdown = -1;
    failed_ |= g_failed;  // a call may do without
    return returned;
  }

  // The same; makes the call again if it failed.
  template <typename Call>
  void attempt(const Call& call) {
    if (try_once(call)) return;
    scheduler_.check_integrity();
    s1::check_invariant(try_once(call), "the second call failed too");
  }

  void add(SeqId id) {
    s1::SequenceSpec spec;
    spec.id = id;
    spec.prompt.assign(static_cast<size_t>(4 + id % 3), static_cast<TokenId>(5 + id % 2));
    spec.priority = static_cast<int32_t>(id % 2);
    spec.stop_tokens = {kEos};
    spec.stream_output = id % 2 == 0;
    spec.max_len = static_cast<int32_t>(spec.prompt.size()) + 18;
    if (scenario_.pins && id == 2) {
      spec.pin = true;
      spec.max_len = static_cast<int32_t>(spec.prompt.size()) + 1;
    } else if (scenario_.thinks && id != 1) {
      spec.budget.format = format_;
      spec.budget.wait = {8, 9};
      spec.budget.forced_end = {kTrigger, 8};
      spec.budget.delimiter_len = 1;
      spec.budget.num_waits = 1;
      spec.thinking_tokens = 0;
      spec.max_thinking = 10;
      spec.loop_repeats = 3;
      for (int32_t at : {0, 4, 7}) spec.checkpoints.push_back({at, 10 * (id + 1) + at});
    }
    attempt([&] { scheduler_.add(spec); });
    known_.insert(id);
    collect();
  }

  void step() {
    if (!try_once([&] { scheduler_.schedule(buffers_.batch); })) return cancel();
    if (buffers_.batch.num_rows == 0) return;
    if (scenario_.multi_step && run_multi_step()) return;
    const std::vector<int64_t> sampled = sample();
    const bool applied = try_once([&] { scheduler_.update(sampled); });
    collect();
    if (!applied) cancel();
  }

  void cancel() {
    attempt_repeated([&] { scheduler_.cancel_step(); });
  }

  // A call that may be repeated from any state that it leaves.
  template <typename Call>
  void attempt_repeated(const Call& call) {
    if (!try_once(call)) s1::check_invariant(try_once(call), "the second call failed too");
    scheduler_.check_integrity();
  }

  // Registers branches, and collects what the sequences gained.
  void collect() {
    for (const auto& [branch, parent] : scheduler_.events().forked) known_.insert(branch);
    for (SeqId id : scheduler_.events().finished) ended_.insert(id);
    std::string records;
    attempt([&] { records = scheduler_.collect_outputs(); });
    for (size_t at = 0; at < records.size();) {
      SeqId id = 0;
      int32_t count = 0;
      records.copy(reinterpret_cast<char*>(&id), sizeof id, at);
      records.copy(reinterpret_cast<char*>(&count), sizeof count, at + s1::kRecordCount);
      std::vector<TokenId> added(static_cast<size_t>(count));
      records.copy(reinterpret_cast<char*>(added.data()), sizeof(TokenId) * added.size(),
                   at + s1::kRecordHead);
      tokens_[id].insert(tokens_[id].end(), added.begin(), added.end());
      at += s1::kRecordHead + static_cast<size_t>(count) * (sizeof(TokenId) + 1);
    }
  }

  // A token that depends on the sequence and the position alone, and on what is banned.
  static TokenId token_at(SeqId id, int64_t position, bool banned) {
    const auto mixed = static_cast<uint64_t>(31 * id + 7 * position + position * position / 5);
    const TokenId first = banned ? 3 : 1;
    return first + static_cast<TokenId>(mixed % static_cast<uint64_t>(kVocab - first));
  }

  std::vector<int64_t> sample() {
    const s1::ScheduledBatch& batch = buffers_.batch;
    std::vector<int64_t> sampled;
    for (int32_t i = 0; i < batch.num_samples; ++i) {
      sampled.push_back(token_at(id_of(batch.sample_req_indices[i]), batch.sample_positions[i],
                                 batch.sample_banned[i] != 0));
    }
    return sampled;
  }

  SeqId id_of(int32_t req_index) {
    for (SeqId id : known_) {
      if (scheduler_.get(id).req_index == req_index) return id;
    }
    throw std::logic_error("no sequence has the row");
  }

  // Decodes sequences that do not think, as a device would. Returns false if no run began.
  bool run_multi_step() {
    const int32_t rows = buffers_.batch.num_rows;
    std::vector<int32_t> fields(static_cast<size_t>(s1::kNumRowFields * rows)), phrases(64);
    std::vector<int64_t> slots(static_cast<size_t>(rows)), positions(slots);
    s1::DeviceBatch device;
    device.num_rows = rows;
    device.max_phrases = static_cast<int32_t>(phrases.size());
    device.fields = fields.data();
    device.slot_mapping = slots.data();
    device.sample_positions = positions.data();
    device.phrases = phrases.data();
    std::vector<SeqId> ids;  // sampling rows stand in the order of the plan
    for (int32_t i = 0; i < buffers_.batch.num_samples; ++i) {
      ids.push_back(id_of(buffers_.batch.sample_req_indices[i]));
    }
    int32_t num_steps = 0;
    if (!try_once([&] {
          num_steps = scheduler_.begin_multi_step(buffers_.batch, device, kMultiSteps, 1);
        })) {
      cancel();
      return true;
    }
    if (num_steps == 0) return false;
    int32_t more = 0;
    if (!try_once([&] { more = scheduler_.extend_multi_step(buffers_.batch, kMultiSteps); })) {
      cancel();
      return true;
    }
    for (const int32_t part : {num_steps, more}) {
      if (part == 0) continue;
      const std::vector<TokenId> sampled = decode(ids, part);
      const bool applied = try_once([&] { scheduler_.apply_multi_step(sampled, part); });
      collect();
      if (applied) continue;
      cancel();
      break;
    }
    return true;
  }

  std::vector<TokenId> decode(const std::vector<SeqId>& ids, int32_t num_steps) {
    std::vector<TokenId> sampled;
    std::map<SeqId, int32_t> lengths;
    for (SeqId id : ids) {
      const s1::Sequence& sequence = scheduler_.get(id);
      lengths[id] = sequence.finished() ? sequence.max_len : sequence.num_tokens();
    }
    for (int32_t step = 0; step < num_steps; ++step) {
      for (SeqId id : ids) {
        const int32_t max_len = scheduler_.get(id).max_len;
        const bool live = lengths[id] < max_len;
        const TokenId token = live ? token_at(id, lengths[id], false) : s1::kNoToken;
        sampled.push_back(token);
        lengths[id] = token == kEos ? max_len : lengths[id] + live;
      }
    }
    return sampled;
  }

  // A prefix of computed blocks, which is pinned.
  void restore_prefix() {
    s1::Sequence prefix;
    prefix.tokens.assign(8, 6);
    prefix.num_settled = prefix.num_tokens();
    bool restored = false;
    attempt([&] { restored = scheduler_.restore(prefix, [](int32_t, auto) {}); });
    s1::check_invariant(restored, "the prefix was not restored");
    attempt([&] {
      const auto ids = scheduler_.blocks().find_prefix(prefix, prefix.num_tokens());
      restored = scheduler_.pin(kPin, ids);
    });
    s1::check_invariant(restored, "the prefix was not pinned");
  }

  const Scenario& scenario_;
  Scheduler scheduler_;
  s1_test::StepBuffers buffers_;
  std::shared_ptr<s1::BudgetFormat> format_ = std::make_shared<s1::BudgetFormat>();
  int64_t left_;
  bool all_fail_;
  bool failed_ = false;
  std::set<SeqId> known_, ended_;
  std::map<SeqId, std::vector<TokenId>> tokens_;
};

int64_t sweep(const Scenario& scenario) {
  Run undisturbed(scenario, INT64_MAX, false);
  undisturbed.run();
  for (int64_t n = 0;; ++n) {
    Run run(scenario, n, n % 2 == 1);
    run.run();
    if (!run.failed()) return n;
    s1::check_invariant(run.tokens() == undisturbed.tokens(), "other tokens after bad_alloc");
  }
}

// A collector that ran out of memory while it added a record has all of it or nothing.
int64_t sweep_collector() {
  s1::Sequence sequence;
  sequence.id = 3;
  std::vector<std::string> records;
  for (int i = 0; i < 6; ++i) {
    for (int k = 0; k < 40; ++k) sequence.append(static_cast<TokenId>(i), s1::kThink);
    sequence.num_settled = sequence.num_tokens();
    s1::append_output(sequence, 0, records.emplace_back());
  }
  for (int64_t n = 0;; ++n) {
    s1::OutputCollector collector(kSequenceBits);
    collector.open(sequence.id);
    g_countdown = n;
    g_all_fail = n % 2 == 1;
    size_t added = 0;
    try {
      while (added < records.size()) collector.add(records[added++]);
      collector.pop_pending();
      g_countdown = -1;
      return n;
    } catch (const std::bad_alloc&) {
      g_countdown = -1;
    }
    const std::string collected = collector.collect(sequence.id);
    const size_t body = 40 * (sizeof(TokenId) + 1);
    const size_t num_tokens = collected.empty() ? 0 : (collected.size() - s1::kRecordHead) / 5;
    s1::check_invariant(collected.empty() || (collected.size() - s1::kRecordHead) % body == 0,
                        "a record was torn");
    s1::check_invariant(num_tokens == 40 * added || num_tokens == 40 * (added - 1),
                        "the collector lost tokens of earlier records");
  }
}

}  // namespace

void sweep_allocations() {
  const auto config = [](auto change) {
    s1::SchedulerConfig made{};
    made.num_blocks = 24;
    made.block_size = 4;
    made.max_num_seqs = 3;
    made.max_num_batched_tokens = 16;
    made.enable_prefix_caching = true;
    made.max_samples = 12;
    change(made);
    return made;
  };
  const Scenario scenarios[] = {
      {.name = "plain", .config = config([](auto&) {})},
      {.name = "tight", .config = config([](auto& c) {
                          c.num_blocks = 8;
                          c.min_reserve = 0.0;
                        })},
      {.name = "thinking", .config = config([](auto&) {}), .thinks = true},
      {.name = "drafts", .config = config([](auto& c) { c.max_draft = 3; }), .thinks = true},
      {.name = "window", .config = config([](auto& c) { c.max_window = 6; }), .thinks = true},
      {.name = "multi-step", .config = config([](auto&) {}), .multi_step = true},
      {.name = "pins", .config = config([](auto& c) { c.max_len = 24; }), .pins = true},
  };
  int64_t failures = sweep_collector();
  for (const Scenario& scenario : scenarios) {
    const int64_t own = sweep(scenario);
    s1::check_invariant(own > 20, scenario.name);
    failures += own;
  }
  std::printf("%lld allocations failed\n", static_cast<long long>(failures));
}
