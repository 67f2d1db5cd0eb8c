// Plain types that every part of the core shares. Standard library only: no Python, no tensors.

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

// 128 bits that are part of every prefix-cache key. Requests share cached blocks only if their
// salts are equal; all zero is the salt of requests that share with everyone.
using Salt = std::array<uint64_t, 2>;

// Phase of a sequence. kOff: it does not think.
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

enum class FinishReason : uint8_t { kNone, kStop, kLength, kAbort, kDeadline };

// Kind of a generated token: its region, and a flag for tokens that the engine forced.
enum Mark : uint8_t {
  kAnswer = 0,     // answer, or plain text of a sequence that does not think
  kThink = 1,      // between the start and the end delimiter
  kDelimiter = 2,  // belongs to neither
  kRegionMask = 3,
  kForced = 4,  // appended by the engine, not sampled
};

// Throws std::logic_error: a violation is a bug of the engine, never a user error.
inline void check_invariant(bool condition, const char* what) {
  if (!condition) throw std::logic_error(std::string("broken invariant: ") + what);
}

}  // namespace s1
