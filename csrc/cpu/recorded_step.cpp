#include "recorded_step.hpp"

namespace s1::cpu {

thread_local std::shared_ptr<RecordedStep> RecordedStep::recording_;

void RecordedStep::record_into(std::shared_ptr<RecordedStep> step) { recording_ = std::move(step); }

}  // namespace s1::cpu
