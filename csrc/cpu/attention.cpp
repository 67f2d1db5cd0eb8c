// Splits the attention of a step into units of work for the thread pool.
//
// A unit is a few consecutive tokens of one sequence with the query heads of one KV head. Units
// that are large beside the whole step (a long context in a small batch) are split further, along
// their context. The load decides about the split; the result is the same with and without it.

#include <algorithm>
#include <limits>
#include <vector>

#include "isa.hpp"
#include "ops.hpp"
#include "scratch.hpp"
#include "thread_pool.hpp"

namespace s1::cpu {
namespace {

constexpr int64_t kUnitRows = 128;      // query rows that share a pass over the keys
constexpr int64_t kMinWork = 1 << 19;   // multiply-adds below which one thread is faster than two
constexpr int64_t kTasksPerThread = 4;  // so that threads end together

struct Task {
  int64_t unit;
  int64_t split;  // -1: the whole context
  int64_t part;   // offset of its result in the parts, in floats
};

struct WorkList {
  std::vector<AttentionUnit> units;
  std::vector<Task> tasks;
  std::vector<Task> merges;  // the first split's task of each unit that was split
  int64_t part_floats = 0;
  int64_t work = 0;  // multiply-adds of the step

  void clear() {
    units.clear();
    tasks.clear();
    merges.clear();
    part_floats = work = 0;
  }
};

int64_t work_of(const Attention& a, const AttentionUnit& unit) {
  return 2 * unit.num_tokens * a.group_size * (unit.end() - unit.first_key) * a.width();
}

void add_units(const Attention& a, const int32_t* cu_seqlens_q, const int32_t* context_lens,
               int64_t sequence, WorkList& list) {
  const int64_t begin = cu_seqlens_q[sequence];
  const int64_t end = cu_seqlens_q[sequence + 1];
  const int64_t tokens = std::max<int64_t>(1, kUnitRows / a.group_size);
  for (int64_t token = begin; token < end; token += tokens) {
    const int64_t position = context_lens[sequence] - end + token;
    for (int64_t head = 0; head < a.num_kv_heads; ++head) {
      list.units.push_back({.sequence = sequence,
                            .kv_head = head,
                            .token = token,
                            .num_tokens = std::min(tokens, end - token),
                            .position = position,
                            .first_key = std::max<int64_t>(position + 1 - a.window, 0)});
      list.work += work_of(a, list.units.back());
    }
  }
}

void add_tasks(const Attention& a, int64_t index, int64_t limit, WorkList& list) {
  const AttentionUnit& unit = list.units[static_cast<size_t>(index)];
  if (unit.end_split() - unit.first_split() == 1 || work_of(a, unit) <= limit) {
    list.tasks.push_back({index, -1, 0});
    return;
  }
  list.merges.push_back({index, unit.first_split(), list.part_floats});
  for (int64_t split = unit.first_split(); split < unit.end_split(); ++split) {
    list.tasks.push_back({index, split, list.part_floats});
    list.part_floats += SoftmaxState::size(unit.num_tokens * a.group_size, a.width());
  }
}

void split_work(const Attention& a, const int32_t* cu_seqlens_q, const int32_t* context_lens,
                int64_t sequences, int threads, WorkList& list) {
  list.clear();
  for (int64_t s = 0; s < sequences; ++s) add_units(a, cu_seqlens_q, context_lens, s, list);
  const int64_t limit = threads == 1 ? list.work : list.work / (kTasksPerThread * threads);
  for (size_t i = 0; i < list.units.size(); ++i) {
    add_tasks(a, static_cast<int64_t>(i), std::max(limit, kMinWork), list);
  }
}

void run_tasks(const Attention& a, const Kernels& k, DType stored, const WorkList& list,
               float* parts) {
  ThreadPool& pool = ThreadPool::instance();
  const CacheKernels& c = k.cache(stored);
  const auto tasks = static_cast<int64_t>(list.tasks.size());
  const auto merges = static_cast<int64_t>(list.merges.size());
  const int64_t scratch_size = attention_scratch(a, std::max(kUnitRows, a.group_size));
  const auto scratch = [scratch_size] {
    static thread_local Scratch memory;
    return memory.get(scratch_size);
  };
  const auto unit_of = [&](const Task& task) -> const AttentionUnit& {
    return list.units[static_cast<size_t>(task.unit)];
  };
  pool.parallel_for(tasks, list.work < kMinWork ? tasks : 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Task& task = list.tasks[static_cast<size_t>(i)];
      if (task.split < 0) {
        c.attend(a, unit_of(task), scratch());
      } else {
        c.attend_part(a, unit_of(task), task.split, parts + task.part, scratch());
      }
    }
  });
  pool.parallel_for(merges, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Task& task = list.merges[static_cast<size_t>(i)];
      k.merge_parts(a, unit_of(task), parts + task.part, scratch());
    }
  });
}

}  // namespace

void paged_attention(int dtype, int cache_dtype, Address q, Address k_cache, Address v_cache,
                     Address out, Address cu_seqlens_q, Address context_lens, Address block_table,
                     int64_t sequences, int64_t block_table_stride, int64_t num_heads,
                     int64_t num_kv_heads, int64_t head_dim, int64_t block_size, int64_t q_stride,
                     float scale, int64_t window, Address sinks) {
  const Attention args{.q = pointer<const void>(q),
                       .k_cache = pointer<const void>(k_cache),
                       .v_cache = pointer<const void>(v_cache),
                       .out = pointer<void>(out),
                       .block_table = pointer<const int32_t>(block_table),
                       .block_table_stride = block_table_stride,
                       .q_stride = q_stride,
                       .num_kv_heads = num_kv_heads,
                       .group_size = num_heads / num_kv_heads,
                       .head_dim = head_dim,
                       .block_size = block_size,
                       .window = window > 0 ? window : std::numeric_limits<int64_t>::max() / 2,
                       .sinks = pointer<const float>(sinks),
                       .scale = scale};
  static thread_local WorkList list;  // static to reuse its memory
  static thread_local Scratch parts;
  split_work(args, pointer<const int32_t>(cu_seqlens_q), pointer<const int32_t>(context_lens),
             sequences, ThreadPool::instance().size(), list);
  run_tasks(args, kernels(DType{dtype}), DType{cache_dtype}, list, parts.get(list.part_floats));
}

}  // namespace s1::cpu
