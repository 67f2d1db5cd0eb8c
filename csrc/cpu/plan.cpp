#include "plan.hpp"

namespace s1::cpu {

thread_local std::shared_ptr<Plan> Plan::recording_;

void Plan::record_into(std::shared_ptr<Plan> plan) { recording_ = std::move(plan); }

}  // namespace s1::cpu
