// Log-probabilities of the tokens of one step, before any rule, as bytes that may leave the
// process. s1engine/logprob_records.py reads them.
//
// One record for each row that wants them, in the order of the rows, little-endian, without
// padding:
//
//   int32   req_index, number of likeliest tokens k
//   float   log-probability of the sampled token
//   int32   likeliest tokens [k], in descending order
//   float   their log-probabilities [k]

#pragma once

#include <string>
#include <vector>

#include "sampler.hpp"

namespace s1::cpu {

class LogprobRecords {
 public:
  // As sampler.sample(), which writes a token [n] for each row. bytes() then holds the records.
  void sample(const Sampler& sampler, const SampledRows& rows, int64_t* tokens);

  const std::string& bytes() const { return bytes_; }
  void clear() { bytes_.clear(); }

 private:
  std::vector<float> chosen_;
  std::vector<float> top_;
  std::vector<int32_t> top_tokens_;
  std::string bytes_;
};

}  // namespace s1::cpu
