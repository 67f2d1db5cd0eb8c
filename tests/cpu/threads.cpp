// Cases with several threads: the pool, recorded steps, and the ranks' collective.

#include <functional>
#include <thread>

#include "cpu/collective.hpp"
#include "cpu/recorded_step.hpp"
#include "cpu/thread_pool.hpp"
#include "harness.hpp"

namespace fuzz {
namespace {

using s1::cpu::Collective;
using s1::cpu::RecordedStep;
using s1::cpu::ThreadPool;

// Calls body(i) for i < count, each on its own thread.
void on_threads(int64_t count, const std::function<void(int64_t)>& body) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < count; ++i) threads.emplace_back(body, i);
  for (std::thread& thread : threads) thread.join();
}

// Many jobs, some nested. Their results are read without further synchronisation: a job is done
// when parallel_for returns.
void run_jobs(Case& c) {
  ThreadPool& pool = ThreadPool::instance();
  for (int64_t job = c.pick(1, 150); job > 0; --job) {
    const int64_t items = c.pick(0, 60), chunk = c.pick(1, 9);
    const bool nested = c.one_in(4);
    std::vector<int32_t> visits(static_cast<size_t>(items), 0);
    pool.parallel_for(items, chunk, [&](int64_t begin, int64_t end) {
      const auto visit = [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) ++visits[static_cast<size_t>(i)];
      };
      if (nested) {
        pool.parallel_for(end - begin, 1,
                          [&](int64_t from, int64_t to) { visit(begin + from, begin + to); });
      } else {
        visit(begin, end);
      }
    });
    for (int64_t i = 0; i < items; ++i) {
      c.near("visits of an item", i, visits[static_cast<size_t>(i)], 1.0, 0.0);
    }
  }
}

}  // namespace

void pool(Case& c) {
  const int size = ThreadPool::instance().size();
  const auto seed = static_cast<uint64_t>(c.pick(0, 1 << 30));
  on_threads(c.pick(1, 3), [&](int64_t caller) {
    Case own(seed + static_cast<uint64_t>(caller));
    run_jobs(own);
    if (caller > 0) ThreadPool::instance().resize(static_cast<int>(own.pick(1, 6)));
    run_jobs(own);
  });
  ThreadPool::instance().resize(size);
}

// Operations of two threads at the same time; at most one of them gets the pool.
void callers(Case& c) {
  const auto seed = static_cast<uint64_t>(c.pick(0, 1 << 30));
  on_threads(2, [&](int64_t caller) {
    Case own(seed + static_cast<uint64_t>(caller));
    for (const auto& operation : {attention, linear, sample, silu_and_mul}) operation(own);
  });
}

// A small layer, recorded once: a replay on new inputs equals calling the operations.
void recorded_step(Case& c) {
  const DType dtype = c.dtype();
  const int number = static_cast<int>(dtype);
  const int64_t rows = c.size(9, 90), dim = 16 * c.pick(1, 8);
  const Numbers weight = Numbers::random(c, dtype, dim);
  const Numbers panels = Numbers::random(c, dtype, 2 * dim * dim, 0.2);
  const Numbers inputs[2] = {Numbers::random(c, dtype, rows * dim, 2.0),
                             Numbers::random(c, dtype, rows * dim, 2.0)};
  Numbers x(c, dtype, rows * dim, 1), residual(c, dtype, rows * dim, 1);
  const Numbers normed(c, dtype, rows * dim), gate_up(c, dtype, rows * 2 * dim);
  const Numbers out(c, dtype, rows * dim);
  const auto set_input = [&](const Numbers& input) {
    for (int64_t i = 0; i < rows * dim; ++i) {
      x.set(i, input[i]);
      residual.set(i, -0.5 * input[i]);
    }
  };
  const auto layer = [&] {
    using s1::cpu::Recorded;
    Recorded<&s1::cpu::add_rms_norm>::call(number, x.address(), residual.address(),
                                           weight.address(), normed.address(), rows, dim, dim, dim,
                                           1e-5f);
    Recorded<&s1::cpu::linear>::call(number, 0, 0, normed.address(), panels.address(), 0, 0,
                                     gate_up.address(), rows, dim, 2 * dim, 1, dim, 2 * dim);
    Recorded<&s1::cpu::silu_and_mul>::call(number, gate_up.address(), out.address(), rows, 2 * dim,
                                           dim);
  };
  const auto steps = std::make_shared<RecordedStep>();
  set_input(inputs[0]);
  RecordedStep::record_into(steps);
  layer();
  RecordedStep::record_into(nullptr);
  c.near("recorded operations", 0, static_cast<double>(steps->size()), 3.0, 0.0);
  set_input(inputs[1]);
  layer();
  const std::vector<double> want = out.values();
  for (const Numbers& input : inputs) {
    set_input(input);
    on_threads(1, [&](int64_t) { steps->replay(); });
  }
  for (int64_t i = 0; i < out.size(); ++i) {
    c.near("replay", i, out[i], want[static_cast<size_t>(i)], 0.0);
  }
  c.add_to_digest(out.data(), out.bytes());
}

namespace {

// Memory that ranks share: zeros, aligned to cache lines.
struct SharedMemory {
  std::unique_ptr<std::byte, decltype(&std::free)> memory;

  explicit SharedMemory(int ranks)
      : memory(static_cast<std::byte*>(std::aligned_alloc(64, bytes(ranks))), &std::free) {
    std::memset(memory.get(), 0, bytes(ranks));
  }
  static size_t bytes(int ranks) {
    return static_cast<size_t>(Collective::memory_bytes(ranks) + 63) / 64 * 64;
  }
  Address address() const { return reinterpret_cast<Address>(memory.get()); }
};

// A number of elements that sometimes needs several pieces.
int64_t long_or_short(Case& c) { return c.one_in(12) ? c.pick(60000, 140000) : c.pick(1, 300); }

// All ranks reduce arrays of one size. Each rank creates the arrays of all, to know the sum.
void all_reduce(Case& c, Collective& collective, int64_t rank, int64_t ranks) {
  const DType dtype = c.dtype();
  const int64_t count = long_or_short(c);
  const bool add = c.one_in(2), in_place = !add && c.one_in(2);
  std::vector<Numbers> parts;
  for (int64_t r = 0; r < ranks; ++r) parts.push_back(Numbers::random(c, dtype, count));
  const Numbers other = Numbers::random(c, dtype, count);
  const std::vector<double> before = other.values();
  std::vector<float> want(static_cast<size_t>(count));
  for (size_t i = 0; i < want.size(); ++i) {
    const auto at = static_cast<int64_t>(i);
    for (const Numbers& part : parts) want[i] += static_cast<float>(part[at]);
    if (add) want[i] += static_cast<float>(before[i]);
  }
  const Numbers& x = parts[static_cast<size_t>(rank)];
  const Numbers& out = in_place ? x : other;
  collective.all_reduce(static_cast<int>(dtype), x.address(), out.address(), count, add);
  Numbers rounded(c, dtype, 1);
  for (int64_t i = 0; i < count; ++i) {
    rounded.set(0, want[static_cast<size_t>(i)]);
    c.near("sum", i, out[i], rounded[0], 0.0);
  }
}

void gather(Case& c, Collective& collective, int64_t rank, int64_t ranks) {
  const int64_t rows = c.pick(1, 5), row_bytes = long_or_short(c);
  std::vector<TightArray<uint8_t>> parts;
  for (int64_t r = 0; r < ranks; ++r) {
    parts.emplace_back(c, rows * row_bytes);
    for (int64_t i = 0; i < rows * row_bytes; ++i) {
      parts.back()[i] = static_cast<uint8_t>(i * 7 + r * 31 + i / 251);
    }
  }
  const bool others_receive = c.one_in(2);  // drawn on all ranks, whose choices must stay the same
  const bool receives = rank == 0 || others_receive;
  TightArray<uint8_t> out(c, receives ? rows * ranks * row_bytes : 0);
  collective.gather(parts[static_cast<size_t>(rank)].address(), receives ? out.address() : 0, rows,
                    row_bytes);
  for (int64_t i = 0; i < out.size(); ++i) {
    const int64_t row = i / (ranks * row_bytes), r = i / row_bytes % ranks;
    const int64_t from = row * row_bytes + i % row_bytes;
    c.near("gathered byte", i, out[i], parts[static_cast<size_t>(r)][from], 0.0);
  }
}

}  // namespace

void collective(Case& c) {
  const int64_t ranks = c.pick(1, 4);
  const auto seed = static_cast<uint64_t>(c.pick(0, 1 << 30));
  const SharedMemory shared(static_cast<int>(ranks));
  on_threads(ranks, [&](int64_t rank) {
    Collective own(shared.address(), static_cast<int>(rank), static_cast<int>(ranks));
    Case same(seed);  // the same choices on all ranks
    for (int64_t call = same.pick(1, 8); call > 0; --call) {
      if (same.one_in(3)) {
        gather(same, own, rank, ranks);
      } else {
        all_reduce(same, own, rank, ranks);
      }
    }
  });
}

// A rank aborts instead of joining a call: the others stop waiting.
void lost_rank(Case& c) {
  const int64_t ranks = c.pick(2, 4), lost = c.pick(0, ranks - 1);
  const SharedMemory shared(static_cast<int>(ranks));
  on_threads(ranks, [&](int64_t rank) {
    Collective own(shared.address(), static_cast<int>(rank), static_cast<int>(ranks));
    if (rank == lost) {
      own.abort();
      return;
    }
    float x[3] = {1.0f, 2.0f, 3.0f};
    bool failed = false;
    try {
      own.all_reduce(0, reinterpret_cast<Address>(x), reinterpret_cast<Address>(x), 3, false);
    } catch (const s1::cpu::CollectiveError&) {
      failed = true;
    }
    if (!failed) std::fprintf(stderr, "a rank did not notice the abort\n"), std::_Exit(1);
  });
}

}  // namespace fuzz
