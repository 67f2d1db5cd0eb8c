#include "decode_loop.hpp"

#include <algorithm>
#include <chrono>

namespace s1 {
namespace {

static_assert(kBanEnds == cpu::kBanRowEnds, "the scheduler's code is the sampler's");

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

}  // namespace

DecodeLoop::DecodeLoop(ScheduledBatch& batch, const cpu::GraphTable& graphs, cpu::Sampler& sampler,
                       const uint8_t* needs_python)
    : batch_(batch), graphs_(graphs), sampler_(sampler), needs_python_(needs_python) {}

bool DecodeLoop::run(Scheduler& scheduler, double seconds, double time_to_deadline,
                     std::span<const uint8_t* const> masks) {
  const auto run_begin = Clock::now();
  logprobs_.clear();
  seconds = std::min(seconds, time_to_deadline);
  for (;;) {
    const auto begin = Clock::now();
    admitted_ = &scheduler.schedule(batch_, time_to_deadline - seconds_since(run_begin));
    const bool decodes = admitted_->empty() && batch_.num_samples == batch_.num_tokens;
    const cpu::Graph* graph = decodes ? graphs_.find(batch_.num_tokens, batch_.num_rows) : nullptr;
    if (graph == nullptr || needs_python(scheduler)) return false;
    const StepEvents& events = scheduler.events();
    sampler_.count_appended(events.appended_req_indices, events.appended_tokens);
    graph->step->replay();
    sample(*graph, masks);
    scheduler.update(tokens_);
    scheduler.record_step_time(seconds_since(begin));
    const bool reports = !events.outputs.empty() || !events.forked.empty();
    const bool single = !masks.empty() || !logprobs_.bytes().empty();
    const bool interrupted = interrupted_.exchange(false, std::memory_order_relaxed);
    if (reports || single || interrupted || seconds_since(run_begin) >= seconds) break;
  }
  records_ = scheduler.collect_outputs();
  return true;
}

// A row that Python samples also sees the tokens of the step before by Python.
bool DecodeLoop::needs_python(const Scheduler& scheduler) const {
  const auto needs = [this](int32_t req_index) { return needs_python_[req_index] != 0; };
  const std::vector<int32_t>& before = scheduler.events().appended_req_indices;
  return std::any_of(batch_.sample_req_indices, batch_.sample_req_indices + batch_.num_samples,
                     needs) ||
         std::any_of(before.begin(), before.end(), needs);
}

void DecodeLoop::sample(const cpu::Graph& graph, std::span<const uint8_t* const> masks) {
  const auto count = static_cast<size_t>(batch_.num_samples);
  tokens_.resize(count);
  if (!masks.empty()) {
    allowed_.resize(count);
    for (size_t i = 0; i < count; ++i) {
      allowed_[i] = masks[static_cast<size_t>(batch_.sample_req_indices[i])];
    }
  }
  logprobs_.sample(sampler_,
                   {.logits = graph.logits,
                    .raw = graph.logits,
                    .stride = graph.stride,
                    .count = batch_.num_samples,
                    .req_indices = batch_.sample_req_indices,
                    .positions = batch_.sample_positions,
                    .banned = batch_.num_banned > 0 ? batch_.sample_banned : nullptr,
                    .allowed = masks.empty() ? nullptr : allowed_.data()},
                   tokens_.data());
}

}  // namespace s1
