// The only file (with its .inc parts) that knows pybind11: it exposes csrc/core and csrc/cpu to
// Python as s1engine._core.
//
// Arrays cross as raw pointers of numpy arrays, whose type and size are checked here; nothing below
// this file sees Python. Exceptions of the core arrive in Python as ValueError or RuntimeError.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/core_output.hpp"
#include "core/output_collector.hpp"
#include "core/scheduler.hpp"
#include "cpu/collective.hpp"
#include "cpu/isa.hpp"
#include "cpu/log_softmax.hpp"
#include "cpu/ops.hpp"
#include "cpu/logprob_records.hpp"
#include "cpu/recorded_step.hpp"
#include "cpu/sampler.hpp"
#include "engine/decode_loop.hpp"

namespace py = pybind11;

namespace {

using IntArray = py::array_t<int32_t, py::array::c_style>;
using LongArray = py::array_t<int64_t, py::array::c_style>;
using ByteArray = py::array_t<uint8_t, py::array::c_style>;

// Pointer to a writable C-contiguous array of at least `size` elements; ValueError names the field.
template <typename T>
T* buffer(const py::array& array, py::ssize_t size, const char* name) {
  const bool fits = py::isinstance<py::array_t<T, py::array::c_style>>(array) && array.writeable();
  if (!fits || array.size() < size) {
    throw py::value_error(std::string(name) + ": wrong dtype, layout or size");
  }
  return static_cast<T*>(const_cast<void*>(array.data()));
}

// A batch that keeps its numpy buffers alive.
struct BoundBatch {
  s1::ScheduledBatch batch;
  std::vector<py::array> owners;
};

std::unique_ptr<BoundBatch> bind_buffers(const py::dict& buffers, int32_t max_tokens,
                                         int32_t max_rows, int32_t max_blocks,
                                         int32_t max_samples) {
  auto bound = std::make_unique<BoundBatch>();
  s1::ScheduledBatch& b = bound->batch;
  b.max_tokens = max_tokens;
  b.max_rows = max_rows;
  b.max_blocks = max_blocks;
  b.max_samples = std::max(max_samples, max_rows);
  const auto bind_field = [&]<typename T>(T*& field, const char* name, int64_t size) {
    bound->owners.push_back(buffers[name].cast<py::array>());
    field = buffer<T>(bound->owners.back(), size, name);
  };
  bind_field(b.input_ids, "input_ids", max_tokens);
  bind_field(b.positions, "positions", max_tokens);
  bind_field(b.slot_mapping, "slot_mapping", max_tokens);
  bind_field(b.cu_seqlens_q, "cu_seqlens_q", max_rows + 1);
  bind_field(b.context_lens, "context_lens", max_rows);
  bind_field(b.block_table, "block_table", static_cast<int64_t>(max_rows) * max_blocks);
  bind_field(b.sample_tokens, "sample_tokens", b.max_samples);
  bind_field(b.sample_req_indices, "sample_req_indices", b.max_samples);
  bind_field(b.sample_positions, "sample_positions", b.max_samples);
  bind_field(b.scored_tokens, "scored_tokens", max_tokens);
  bind_field(b.scored_targets, "scored_targets", max_tokens);
  bind_field(b.sample_banned, "sample_banned", b.max_samples);
  return bound;
}

// A device batch that keeps its numpy buffers alive.
struct BoundDeviceBatch {
  s1::DeviceBatch batch;
  std::vector<py::array> owners;
};

std::unique_ptr<BoundDeviceBatch> bind_device_buffers(const py::array& fields,
                                                      const py::array& slot_mapping,
                                                      const py::array& sample_positions,
                                                      const py::array& phrases, int64_t null_slot) {
  auto bound = std::make_unique<BoundDeviceBatch>();
  s1::DeviceBatch& b = bound->batch;
  bound->owners = {fields, slot_mapping, sample_positions, phrases};
  const py::ssize_t rows = slot_mapping.size();
  b.fields = buffer<int32_t>(fields, rows * s1::kNumRowFields, "fields");
  b.slot_mapping = buffer<int64_t>(slot_mapping, rows, "slot_mapping");
  b.sample_positions = buffer<int64_t>(sample_positions, rows, "sample_positions");
  b.phrases = buffer<int32_t>(phrases, 0, "phrases");
  b.num_rows = static_cast<int32_t>(rows);
  b.max_phrases = static_cast<int32_t>(phrases.size());
  b.null_slot = null_slot;
  return bound;
}

s1::Salt salt_from(const py::bytes& bytes) {
  const std::string_view view = bytes;
  s1::Salt salt{};
  if (view.size() != sizeof salt) throw py::value_error("salt: must have 16 bytes");
  std::memcpy(salt.data(), view.data(), sizeof salt);
  return salt;
}

// An output record (core/core_output.hpp) as a dict.
py::dict collect_output_dict(s1::Scheduler& scheduler, s1::SeqId id) {
  s1::Sequence& s = scheduler.get(id);
  const auto first = static_cast<size_t>(s.num_collected);
  s.num_collected = s.num_settled - s.prompt_len;
  py::dict out;
  const auto* tokens = s.tokens.data() + s.prompt_len;
  out["token_ids"] = std::vector<int32_t>(tokens + first, tokens + s.num_collected);
  out["marks"] = std::vector<int>(s.marks.begin() + static_cast<int64_t>(first),
                                  s.marks.begin() + s.num_collected);
  out["phase"] = s.thinking.phase;
  out["finish_reason"] = s.finish_reason;
  out["end_reason"] = s.thinking.end_reason;
  out["thinking_tokens"] = s.thinking.thinking_tokens;
  out["max_thinking"] = s.thinking.max_thinking;
  out["waits_used"] = s.thinking.waits_used;
  out["held"] = s.thinking.held;
  out["num_cached"] = std::max(s.num_cached, 0);
  out["checkpoints_left"] = static_cast<int32_t>(s.checkpoints.size());
  return out;
}

#include "bindings_budget.inc"
#include "bindings_drafts.inc"
#include "bindings_prefix.inc"

void bind_batch(py::module_& m) {
  py::class_<BoundBatch>(m, "ScheduledBatch")
      .def(py::init(&bind_buffers), py::arg("buffers"), py::kw_only(), py::arg("max_tokens"),
           py::arg("max_rows"), py::arg("max_blocks"), py::arg("max_samples") = 0)
      .def_property_readonly("num_tokens", [](const BoundBatch& b) { return b.batch.num_tokens; })
      .def_property_readonly("num_rows", [](const BoundBatch& b) { return b.batch.num_rows; })
      .def_property_readonly("num_samples", [](const BoundBatch& b) { return b.batch.num_samples; })
      .def_property_readonly("num_scored", [](const BoundBatch& b) { return b.batch.num_scored; })
      .def_property_readonly("scored_spans",
                             [](const BoundBatch& b) {
                               std::vector<std::tuple<s1::SeqId, int32_t, int32_t>> spans;
                               for (const auto& span : b.batch.scored_spans) {
                                 spans.emplace_back(span.id, span.first, span.count);
                               }
                               return spans;
                             })
      .def_property_readonly("num_banned", [](const BoundBatch& b) { return b.batch.num_banned; })
      .def_property_readonly("max_seqlen_q",
                             [](const BoundBatch& b) { return b.batch.max_seqlen_q; })
      .def_property_readonly("num_decode_rows",
                             [](const BoundBatch& b) { return b.batch.num_decode_rows; });
}

void bind_device_batch(py::module_& m) {
  py::class_<BoundDeviceBatch>(m, "DeviceBatch")
      .def(py::init(&bind_device_buffers), py::kw_only(), py::arg("fields"),
           py::arg("slot_mapping"), py::arg("sample_positions"), py::arg("phrases"),
           py::arg("null_slot"))
      .def_property_readonly("num_phrases",
                             [](const BoundDeviceBatch& b) { return b.batch.num_phrases; });
  m.attr("ROW_FIELDS") = py::tuple(py::cast(s1::kRowFieldNames));
  m.attr("NO_TOKEN") = s1::kNoToken;
  m.attr("NO_REQ_INDEX") = s1::kNoReqIndex;
  m.attr("BAN_ENDS") = s1::kBanEnds;
}

void bind_stats(py::module_& m) {
  using s1::SchedulerStats;
  py::class_<SchedulerStats>(m, "SchedulerStats")
      .def_readonly("num_steps", &SchedulerStats::num_steps)
      .def_readonly("num_computed_tokens", &SchedulerStats::num_computed_tokens)
      .def_readonly("num_sampled_tokens", &SchedulerStats::num_sampled_tokens)
      .def_readonly("num_forced_tokens", &SchedulerStats::num_forced_tokens)
      .def_readonly("num_preemptions", &SchedulerStats::num_preemptions)
      .def_readonly("num_drafts", &SchedulerStats::num_drafts)
      .def_readonly("num_draft_tokens", &SchedulerStats::num_draft_tokens)
      .def_readonly("num_accepted_tokens", &SchedulerStats::num_accepted_tokens)
      .def_readonly("num_undrafted", &SchedulerStats::num_undrafted)
      .def_readonly("prefix_queries", &SchedulerStats::prefix_queries)
      .def_readonly("prefix_hits", &SchedulerStats::prefix_hits)
      .def_readonly("num_running", &SchedulerStats::num_running)
      .def_readonly("num_waiting", &SchedulerStats::num_waiting)
      .def_readonly("num_free_blocks", &SchedulerStats::num_free_blocks)
      .def_readonly("num_pinned_blocks", &SchedulerStats::num_pinned_blocks)
      .def_readonly("max_pinned_blocks", &SchedulerStats::max_pinned_blocks);
}

void add(s1::Scheduler& scheduler, s1::SeqId id, const IntArray& prompt, int32_t max_len,
         int32_t priority, int64_t client, int64_t order, std::vector<s1::TokenId> stop_tokens,
         bool stream_output, const py::bytes& salt, const s1::BudgetParams* budget,
         int32_t thinking_tokens, int32_t max_thinking,
         const std::vector<std::pair<int32_t, s1::SeqId>>& checkpoints, int32_t loop_repeats,
         s1::Drafting drafting, bool interactive, bool pin, int32_t min_tokens,
         int32_t num_to_score) {
  std::vector<s1::Checkpoint> below;
  for (const auto& [maximum, branch] : checkpoints) below.push_back({maximum, branch});
  scheduler.add({.id = id,
                 .prompt = {prompt.data(), prompt.data() + prompt.size()},
                 .max_len = max_len,
                 .min_tokens = min_tokens,
                 .priority = priority,
                 .client = client,
                 .order = order,
                 .stop_tokens = std::move(stop_tokens),
                 .stream_output = stream_output,
                 .interactive = interactive,
                 .pin = pin,
                 .num_to_score = num_to_score,
                 .salt = salt_from(salt),
                 .budget = budget == nullptr ? s1::BudgetParams{} : *budget,
                 .thinking_tokens = budget == nullptr ? -1 : thinking_tokens,
                 .max_thinking = max_thinking,
                 .checkpoints = std::move(below),
                 .loop_repeats = loop_repeats,
                 .drafting = drafting});
}

void bind_scheduler(py::module_& m) {
  using s1::Scheduler;
  py::class_<Scheduler> scheduler(m, "Scheduler");
  bind_prefixes(scheduler);
  scheduler
      .def(py::init([](int32_t num_blocks, int32_t block_size, int32_t max_num_seqs,
                       int32_t max_num_batched_tokens, bool enable_prefix_caching, int32_t max_len,
                       int32_t max_window, double min_reserve, int32_t max_draft,
                       int32_t max_samples, std::vector<std::pair<int32_t, double>> step_costs,
                       double max_step_time, double max_run_time) {
             return std::make_unique<Scheduler>(s1::SchedulerConfig{
                 num_blocks, block_size, max_num_seqs, max_num_batched_tokens,
                 enable_prefix_caching, max_len, max_window, min_reserve, max_draft, max_samples,
                 std::move(step_costs), max_step_time, max_run_time});
           }),
           py::kw_only(), py::arg("num_blocks"), py::arg("block_size"), py::arg("max_num_seqs"),
           py::arg("max_num_batched_tokens"), py::arg("enable_prefix_caching") = true,
           py::arg("max_len") = 0, py::arg("max_window") = 0,
           py::arg("min_reserve") = s1::SchedulerConfig{}.min_reserve, py::arg("max_draft") = 0,
           py::arg("max_samples") = 0,
           py::arg("step_costs") = std::vector<std::pair<int32_t, double>>(),
           py::arg("max_step_time") = 0.0, py::arg("max_run_time") = 0.0)
      .def("add", &add, py::arg("id"), py::arg("prompt"), py::kw_only(), py::arg("max_len"),
           py::arg("priority") = 0, py::arg("client") = 0, py::arg("order") = 0,
           py::arg("stop_tokens") = std::vector<s1::TokenId>(), py::arg("stream_output") = false,
           py::arg("salt") = py::bytes(std::string(16, '\0')), py::arg("budget") = nullptr,
           py::arg("thinking_tokens") = -1, py::arg("max_thinking") = 0,
           py::arg("checkpoints") = std::vector<std::pair<int32_t, s1::SeqId>>(),
           py::arg("loop_repeats") = 0, py::arg("drafting") = s1::Drafting::kAlways,
           py::arg("interactive") = false, py::arg("pin") = false, py::arg("min_tokens") = 0,
           py::arg("num_to_score") = 0)
      .def(
          "schedule",
          [](Scheduler& self, BoundBatch& b, double time_to_deadline) {
            return self.schedule(b.batch, time_to_deadline);
          },
          py::arg("batch"), py::arg("time_to_deadline") = std::numeric_limits<double>::infinity())
      .def("update",
           [](Scheduler& self, const LongArray& sampled) {
             self.update({sampled.data(), static_cast<size_t>(sampled.size())});
           })
      .def("record_step_time", &Scheduler::record_step_time)
      .def_property_readonly("decode_time", &Scheduler::decode_time)
      .def(
          "begin_multi_step",
          [](Scheduler& self, BoundBatch& b, BoundDeviceBatch& d, int32_t num_steps,
             int32_t max_inline_tokens) {
            return self.begin_multi_step(b.batch, d.batch, num_steps, max_inline_tokens);
          },
          py::arg("batch"), py::arg("device_batch"), py::kw_only(), py::arg("num_steps"),
          py::arg("max_inline_tokens"))
      .def("extend_multi_step",
           [](Scheduler& self, BoundBatch& b, int32_t num_steps) {
             return self.extend_multi_step(b.batch, num_steps);
           })
      .def(
          "apply_multi_step",
          [](Scheduler& self, const IntArray& sampled, double seconds) {
            if (sampled.ndim() != 2) throw py::value_error("sampled: shape [steps, rows] expected");
            self.apply_multi_step({sampled.data(), static_cast<size_t>(sampled.size())},
                                  static_cast<int32_t>(sampled.shape(0)), seconds);
          },
          py::arg("sampled"), py::arg("seconds") = 0.0)
      .def("cancel_step", &Scheduler::cancel_step)
      .def_property_readonly("num_steps_in_flight", &Scheduler::num_steps_in_flight)
      .def_property_readonly(
          "outputs", [](const Scheduler& self) -> const auto& { return self.events().outputs; })
      .def_property_readonly(
          "finished", [](const Scheduler& self) -> const auto& { return self.events().finished; })
      .def_property_readonly(
          "forked", [](const Scheduler& self) -> const auto& { return self.events().forked; })
      .def_property_readonly(
          "appended",
          [](const Scheduler& self) {
            const auto& req_indices = self.events().appended_req_indices;
            const auto& tokens = self.events().appended_tokens;
            return std::pair(
                IntArray(static_cast<py::ssize_t>(req_indices.size()), req_indices.data()),
                IntArray(static_cast<py::ssize_t>(tokens.size()), tokens.data()));
          })
      .def("finish", &Scheduler::finish)
      .def("limit_thinking", &Scheduler::limit_thinking)
      .def("stop_streaming", &Scheduler::stop_streaming)
      .def("remove", &Scheduler::remove)
      .def("collect_output_dict", &collect_output_dict)
      .def("collect_outputs", [](Scheduler& self) { return py::bytes(self.collect_outputs()); })
      .def("collect_output",
           [](Scheduler& self, s1::SeqId id) {
             std::string record;
             s1::append_output(self.get(id), s1::kNoReqIndex, record);
             return py::bytes(record);
           })
      .def("collect_again",
           [](Scheduler& self, s1::SeqId id, int32_t req_index, int32_t num_collected) {
             s1::Sequence& sequence = self.get(id);
             if (num_collected < 0 || num_collected > sequence.num_settled - sequence.prompt_len)
               throw py::value_error("num_collected: more than the sequence has");
             std::string record;
             sequence.num_collected = num_collected;
             s1::append_output(sequence, req_index, record);
             return py::bytes(record);
           })
      .def("tokens", [](Scheduler& self, s1::SeqId id) { return self.get(id).tokens; })
      .def("req_index", [](Scheduler& self, s1::SeqId id) { return self.get(id).req_index; })
      .def("blocks", [](Scheduler& self, s1::SeqId id) { return self.get(id).blocks; })
      .def("num_settled", [](Scheduler& self, s1::SeqId id) { return self.get(id).num_settled; })
      .def("num_computed", [](Scheduler& self, s1::SeqId id) { return self.get(id).num_computed; })
      .def("has_unfinished", &Scheduler::has_unfinished)
      .def("num_waiting", &Scheduler::num_waiting, py::arg("client"))
      .def("tokens_served", &Scheduler::tokens_served, py::arg("client"))
      .def("stats", &Scheduler::stats)
      .def("clear_cache", &Scheduler::clear_cache)
      .def("check_integrity", &Scheduler::check_integrity);
}

void bind_output_collector(py::module_& m) {
  using s1::OutputCollector;
  py::class_<OutputCollector>(m, "OutputCollector")
      .def(py::init<int32_t>(), py::kw_only(), py::arg("sequence_bits"))
      .def("open", &OutputCollector::open)
      .def("close", &OutputCollector::close)
      .def("__len__", &OutputCollector::size)
      .def("add", [](OutputCollector& self, const py::bytes& records) { return self.add(records); })
      .def_property_readonly("has_pending", &OutputCollector::has_pending)
      .def("pop_pending", &OutputCollector::pop_pending)
      .def("collect",
           [](OutputCollector& self, int64_t request) { return py::bytes(self.collect(request)); });
}

void bind_core(py::module_& m) {
  bind_enums(m);
  bind_budget(m);
  bind_batch(m);
  bind_device_batch(m);
  bind_drafts(m);
  bind_stats(m);
  bind_scheduler(m);
  bind_output_collector(m);
}

#include "bindings_sampler.inc"
#include "bindings_cpu.inc"

// Decode steps, or the plan of the one that the caller has to take. `allowed`: bitmasks by
// req_index, of the rows that follow a grammar.
py::object run_decode_loop(s1::DecodeLoop& self, s1::Scheduler& scheduler, double seconds,
                           double time_to_deadline, const std::map<int32_t, ByteArray>& allowed) {
  std::vector<const uint8_t*> masks;
  for (const auto& [req_index, bits] : allowed) {
    masks.resize(static_cast<size_t>(self.max_rows()), nullptr);
    if (bits.size() < (self.vocab_size() + 7) / 8) throw py::value_error("allowed: too few bits");
    masks.at(static_cast<size_t>(req_index)) = bits.data();
  }
  bool decoded = false;
  {
    const py::gil_scoped_release unlocked;
    decoded = self.run(scheduler, seconds, time_to_deadline, masks);
  }
  if (decoded) return py::bytes(self.records());
  return py::cast(self.admitted());
}

void bind_decode_loop(py::module_& m) {
  using s1::DecodeLoop;
  py::class_<DecodeLoop>(m, "DecodeLoop")
      .def(py::init([](BoundBatch& batch, const s1::cpu::GraphTable& graphs, BoundSampler& sampler,
                       const py::array& needs_python) {
             const uint8_t* flags =
                 buffer<uint8_t>(needs_python, batch.batch.max_rows, "needs_python");
             return std::make_unique<DecodeLoop>(batch.batch, graphs, sampler.sampler, flags);
           }),
           py::keep_alive<1, 2>(), py::keep_alive<1, 3>(), py::keep_alive<1, 4>(),
           py::keep_alive<1, 5>())
      .def("run", &run_decode_loop)
      .def_property_readonly("logprobs",
                             [](const DecodeLoop& self) { return py::bytes(self.logprobs()); })
      .def("interrupt", &DecodeLoop::interrupt);
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "C++ core (scheduler, blocks, thinking budgets) and CPU kernels of s1engine.";
  bind_core(m);
  bind_cpu(m);
  bind_decode_loop(m);
}
