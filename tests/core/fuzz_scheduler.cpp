// Fuzzes the scheduler without Python, under address and undefined-behaviour sanitizers: random
// sequences with budgets, priorities and deadlines, small caches, random step times, aborts and
// limits at random moments. The integrity of
// everything is checked after each step. Then fuzzes output records (fuzz_output_collector.cpp),
// and lets each allocation fail (sweep_allocations.cpp). Success is exit status 0 and a line of
// counts.

#include <algorithm>
#include <cstdio>
#include <random>
#include <set>
#include <vector>

#include "core/scheduler.hpp"
#include "step_buffers.hpp"

void fuzz_output_collector(uint64_t seed);
void sweep_allocations();

namespace {

using s1::Scheduler;
using s1::TokenId;
using s1_test::StepBuffers;

constexpr TokenId kVocab = 16;
constexpr TokenId kEos = 1;
constexpr TokenId kTrigger = 2;

class Fuzz {
 public:
  explicit Fuzz(uint64_t seed) : random_(seed) {
    config_.block_size = pick(1, 8);
    config_.num_blocks = 80 / config_.block_size + pick(1, 8);
    config_.max_num_seqs = pick(1, 6);
    config_.max_num_batched_tokens = pick(config_.max_num_seqs, 32);
    config_.enable_prefix_caching = pick(0, 3) > 0;
    config_.max_len = pick(0, 1) * 70;
    config_.max_window = pick(0, 1) * pick(1, 20);
    config_.max_draft = pick(0, 2) * pick(1, 4);
    config_.max_samples = config_.max_num_seqs + pick(0, 12);
    config_.max_step_time = pick(0, 2) * 1e-3;
    format_->triggers = {kTrigger, kEos};
    format_->natural_end = {kTrigger, 7};
    format_->newline = {3};
    format_->ends_in_newline = std::vector<uint8_t>(kVocab, 0);
    format_->ends_in_newline[3] = 1;
    if (pick(0, 1) == 0) return;
    format_->end_markers = s1::EndMatcher({"abab"}, token_bytes());
    format_->after_marker = phrase(pick(0, 2));
  }

  // Branches forked so far.
  int64_t forks() const { return forks_; }

  // Blocks that were pinned at the end of each run.
  int64_t pinned() const { return pinned_; }

  // Draft tokens that were accepted.
  int64_t accepted() const { return accepted_; }

  // Returns the number of preemptions, which proves that the fuzz reaches them.
  int64_t run(int32_t num_sequences) {
    Scheduler scheduler(config_);
    StepBuffers buffers(config_.max_num_batched_tokens, config_.max_num_seqs, config_.num_blocks,
                        config_.max_samples);
    std::set<s1::SeqId> live;
    for (s1::SeqId id = 0; id < num_sequences || scheduler.has_unfinished();) {
      if (id < num_sequences && pick(0, 2) == 0) {
        scheduler.add(pick(0, 3) == 0 ? pinning_spec(id, scheduler.blocks()) : spec(id));
        live.insert(id++);
        add_branches(scheduler, live);
      }
      if (pick(0, 9) == 0) scheduler.unpin(pick(0, num_sequences));
      scheduler.schedule(buffers.batch, pick(-1, 5) * 1e-3);
      if (!live.empty() && pick(0, 9) == 0) disturb(scheduler, *live.begin(), live);
      if (pick(0, 19) == 0) {
        scheduler.cancel_step();  // the step was interrupted
      } else if (buffers.batch.num_rows > 0) {
        scheduler.update(sample(buffers.batch));
        if (pick(0, 4) > 0) scheduler.record_step_time(pick(0, 100) * 1e-4);
        add_branches(scheduler, live);
      }
      scheduler.check_integrity();
      for (const auto& [done, req_index] : scheduler.events().outputs) {
        if (live.contains(done) && scheduler.get(done).finished()) {
          scheduler.remove(done);
          live.erase(done);
        }
      }
    }
    pinned_ += scheduler.stats().num_pinned_blocks;
    for (s1::SeqId id = 0; id < num_sequences; ++id) scheduler.unpin(id);
    const s1::SchedulerStats stats = scheduler.stats();
    s1::check_invariant(stats.num_free_blocks == config_.num_blocks, "block lost");
    accepted_ += stats.num_accepted_tokens;
    return stats.num_preemptions;
  }

 private:
  int32_t pick(int32_t low, int32_t high) {
    return std::uniform_int_distribution<int32_t>(low, high)(random_);
  }

  void add_branches(const Scheduler& scheduler, std::set<s1::SeqId>& live) {
    for (const auto& [branch, parent] : scheduler.events().forked) live.insert(branch);
    forks_ += static_cast<int64_t>(scheduler.events().forked.size());
  }

  std::vector<TokenId> phrase(int32_t length) {
    std::vector<TokenId> tokens;
    while (length-- > 0) tokens.push_back(pick(3, kVocab - 1));
    return tokens;
  }

  // Short texts of two letters, so that markers are begun, broken off and completed all the time.
  std::vector<std::string> token_bytes() {
    std::vector<std::string> bytes(3);
    while (bytes.size() < kVocab) {
      std::string text;
      for (int32_t i = pick(0, 3); i > 0; --i) text += pick(0, 1) == 0 ? 'a' : 'b';
      bytes.push_back(text);
    }
    return bytes;
  }

  s1::SequenceSpec spec(s1::SeqId id) {
    s1::SequenceSpec spec;
    spec.id = id;
    spec.prompt = pick(0, 1) == 0 ? std::vector<TokenId>(12, 5) : phrase(pick(1, 20));
    spec.priority = pick(0, 2);
    spec.client = pick(0, 2);
    spec.stop_tokens = {kEos};
    spec.stream_output = pick(0, 1) == 0;
    spec.interactive = pick(0, 1) == 0;
    spec.salt = {static_cast<uint64_t>(pick(0, 1)), 0};
    spec.max_len = static_cast<int32_t>(spec.prompt.size()) + 50;
    if (pick(0, 2) == 0) return spec;
    spec.budget.format = format_;
    spec.budget.wait = phrase(pick(0, 3));
    spec.budget.forced_end = {kTrigger, 8, 9};
    spec.budget.delimiter_len = 1;
    spec.thinking_tokens = 0;
    spec.max_thinking = pick(0, 30);
    spec.budget.min_thinking = pick(0, spec.max_thinking);
    spec.budget.num_waits = pick(0, 3);
    spec.loop_repeats = pick(0, 1) * pick(2, 4);
    for (int32_t maximum = spec.budget.min_thinking; maximum < spec.max_thinking; maximum += 7) {
      spec.checkpoints.push_back({maximum, 1000 * (id + 1) + maximum});
    }
    return spec;
  }

  // A sequence that pins its prompt, if anything can be pinned.
  s1::SequenceSpec pinning_spec(s1::SeqId id, const s1::BlockManager& blocks) {
    s1::SequenceSpec pinning = spec(id);
    const int32_t most = std::min(blocks.max_pinned(), 20 / blocks.block_size());
    if (most == 0) return pinning;
    pinning.prompt.resize(static_cast<size_t>(pick(1, most) * blocks.block_size()), 5);
    pinning.max_len = static_cast<int32_t>(pinning.prompt.size()) + 1;
    pinning.pin = true;
    pinning.thinking_tokens = -1;
    pinning.checkpoints.clear();
    return pinning;
  }

  std::vector<int64_t> sample(const s1::ScheduledBatch& batch) {
    std::vector<int64_t> tokens;
    for (int32_t i = 0; i < batch.num_samples; ++i) {
      tokens.push_back(pick(batch.sample_banned[i] != 0 ? 3 : 1, kVocab - 1));
    }
    return tokens;
  }

  void disturb(Scheduler& scheduler, s1::SeqId id, std::set<s1::SeqId>& live) {
    if (pick(0, 1) == 0) {
      scheduler.limit_thinking(id, pick(0, 10), s1::EndReason::kDeadline);
      return;
    }
    scheduler.finish(id, pick(0, 1) == 0 ? s1::FinishReason::kAbort : s1::FinishReason::kDeadline);
    scheduler.remove(id);
    live.erase(id);
  }

  std::mt19937_64 random_;
  int64_t forks_ = 0;
  int64_t accepted_ = 0;
  int64_t pinned_ = 0;
  s1::SchedulerConfig config_;
  std::shared_ptr<s1::BudgetFormat> format_ = std::make_shared<s1::BudgetFormat>();
};

}  // namespace

int main() {
  int64_t preemptions = 0;
  int64_t forks = 0;
  int64_t accepted = 0;
  int64_t pinned = 0;
  for (uint64_t seed = 0; seed < 300; ++seed) {
    Fuzz fuzz(seed);
    preemptions += fuzz.run(20);
    forks += fuzz.forks();
    accepted += fuzz.accepted();
    pinned += fuzz.pinned();
    fuzz_output_collector(seed);
  }
  sweep_allocations();
  s1::check_invariant(preemptions > 0, "the fuzz never preempted");
  s1::check_invariant(forks > 0, "the fuzz never forked");
  s1::check_invariant(accepted > 0, "the fuzz never accepted a draft token");
  s1::check_invariant(pinned > 0, "the fuzz never pinned");
  std::printf(
      "300 scenarios, %lld preemptions, %lld forks, %lld draft tokens accepted, %lld blocks "
      "pinned\n",
      static_cast<long long>(preemptions), static_cast<long long>(forks),
      static_cast<long long>(accepted), static_cast<long long>(pinned));
  return 0;
}
