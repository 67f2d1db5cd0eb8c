// What the cases of sampling share: how a token must follow from a row.

#pragma once

#include <cstdint>
#include <vector>

#include "harness.hpp"

namespace fuzz {

struct Filter {
  double temperature;
  int64_t top_k;
  double top_p, min_p;
};

// Checks that `token` is the definition's sample of a row of logits that are divided by the
// temperature already.
void check_row(Case& c, const std::vector<float>& scaled, const Filter& f, uint64_t seed,
               uint64_t position, int64_t token);

}  // namespace fuzz
