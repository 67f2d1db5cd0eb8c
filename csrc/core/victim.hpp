// Which running sequence gives its row and its blocks back where they do not suffice.
//
// Knows priorities and the shares of clients. Whether blocks suffice is decided elsewhere.

#pragma once

#include <vector>

#include "scheduler_config.hpp"
#include "sequence.hpp"

namespace s1 {

// How often a sequence makes room for others of higher priority before it may run undisturbed.
constexpr int32_t kMaxDisplacements = 3;

// True if `victim` may make room for the waiting `sequence`: because its priority is lower, or
// because several sequences of its client run and none of the other's.
bool can_displace(const Sequence& victim, const Sequence& sequence);

// The running sequence that makes room first; with a `displacer`, of those that it may displace.
// By priority, then of clients of which several run, then of the client with the largest share of
// the rows or of the blocks (its dominant share), then the last in order. Null if there is none.
Sequence* next_victim(const std::vector<Sequence*>& running, const SchedulerConfig& config,
                      const Sequence* displacer);

}  // namespace s1
