#include "victim.hpp"

#include <algorithm>
#include <unordered_map>

#include "fair_queue.hpp"

namespace s1 {

bool can_displace(const Sequence& victim, const Sequence& sequence) {
  if (victim.priority > sequence.priority && victim.num_displaced < kMaxDisplacements) return true;
  return victim.priority >= sequence.priority && sequence.share->num_running == 0 &&
         victim.share->num_running > 1;
}

Sequence* next_victim(const std::vector<Sequence*>& running, const SchedulerConfig& config,
                      const Sequence* displacer) {
  std::unordered_map<const ClientShare*, int64_t> blocks;
  for (const Sequence* s : running) blocks[s->share] += s->num_held_blocks();
  const auto dominant_share = [&](const ClientShare* share) {
    return std::max(int64_t{share->num_running} * config.num_blocks,
                    blocks[share] * config.max_num_seqs);
  };
  const auto yields_before = [&](const Sequence& a, const Sequence& b) {
    if (a.priority != b.priority) return a.priority > b.priority;
    const bool several_a = a.share->num_running > 1, several_b = b.share->num_running > 1;
    if (several_a != several_b) return several_a;
    const int64_t share_a = dominant_share(a.share), share_b = dominant_share(b.share);
    return share_a != share_b ? share_a > share_b : b.precedes(a);
  };
  Sequence* victim = nullptr;
  for (Sequence* s : running) {
    if (displacer != nullptr && !can_displace(*s, *displacer)) continue;
    if (victim == nullptr || yields_before(*s, *victim)) victim = s;
  }
  return victim;
}

}  // namespace s1
