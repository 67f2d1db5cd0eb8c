// Branches of a thinking sequence at its checkpoints.
//
// A branch is what the sequence would be under the smaller maximum of a checkpoint. Sequence and
// branch are one as long as both budgets decide the same, and part at the first token where they
// do not. A larger maximum never parts before a smaller one. Decides by the transitions of
// budget.hpp alone; the caller schedules the branches.

#pragma once

#include <memory>
#include <vector>

#include "sequence.hpp"

namespace s1 {

using Branches = std::vector<std::unique_ptr<Sequence>>;

// Branches at checkpoints that the thinking in the prompt has used up: the first ones of `parent`,
// for the caller to remove.
Branches branch_at_start(const Sequence& parent);

// Branches that part when `sampled` is applied; call it before the token is applied to `parent`.
// Their checkpoints are the first ones of `parent`, for the caller to remove.
Branches branch_before(const Sequence& parent, TokenId sampled);

}  // namespace s1
