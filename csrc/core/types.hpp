// Plain types that every part of the core shares. Standard library only, no Python, no tensors.

#pragma once

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace s1 {

using TokenId = int32_t;
using BlockId = int32_t;
using SeqId = int64_t;

constexpr BlockId kNoBlock = -1;
constexpr int32_t kNoReqIndex = -1;

// 128 bits that separate the prefix caches of requests that must not share; all zero: shared by
// all.
using Salt = std::array<uint64_t, 2>;

// Where a sequence stands with its thinking. kOff: it does not think.
enum class Phase : uint8_t { kOff, kThinking, kAnswering };

// Why thinking ended.
enum class EndReason : uint8_t {
  kNone,
  kNatural,
  kBudget,
  kDeadline,
  kClient,
  kLoop,
  kConverged,
  kLength,
  kAbort,
  kOverload
};

enum class FinishReason : uint8_t { kNone, kStop, kLength, kAbort };

// What a generated token is. The low bits tell the region, the flag that it was injected.
enum Mark : uint8_t {
  kAnswer = 0,     // answer, or plain text of a sequence that does not think
  kThink = 1,      // between the start and the end delimiter
  kDelimiter = 2,  // belongs to neither
  kRegionMask = 3,
  kForced = 4,  // not sampled but appended by the engine
};

// An invariant of ours is broken: never the user's fault, never to be ignored.
inline void check(bool condition, const char* what) {
  if (!condition) throw std::logic_error(std::string("broken invariant: ") + what);
}

}  // namespace s1
