#include "block_manager.hpp"

#include <algorithm>
#include <new>

namespace s1 {

namespace {

// Finaliser of splitmix64: spreads every input bit over the word.
uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

}  // namespace

BlockManager::BlockManager(int32_t num_blocks, int32_t block_size, bool enable_prefix_caching,
                           int32_t window, int32_t max_step_tokens, int32_t max_len)
    : block_size_(block_size),
      caching_(enable_prefix_caching),
      window_{window, block_size, max_step_tokens},
      cache_(0, Hash{this}, Equal{this}) {
  if (num_blocks < 1) throw std::invalid_argument("num_blocks must be positive");
  if (block_size < 1) throw std::invalid_argument("block_size must be positive");
  blocks_.resize(static_cast<size_t>(num_blocks) + 1);
  tokens_.resize(static_cast<size_t>(num_blocks) * static_cast<size_t>(block_size));
  at(num_blocks).prev = at(num_blocks).next = num_blocks;
  for (BlockId id = 0; id < num_blocks; ++id) link_before(id, num_blocks);
  if (max_len == 0) return;
  const int32_t rest = num_blocks - window_.max_blocks(max_len, max_len);
  max_pinned_ = std::max(std::min(num_blocks / 2, rest), 0);
}

/* === free list: circular; the head is the extra block at the end === */

void BlockManager::unlink(BlockId id) {
  at(at(id).prev).next = at(id).next;
  at(at(id).next).prev = at(id).prev;
  at(id).prev = at(id).next = kNoBlock;
  --num_free_;
}

void BlockManager::link_before(BlockId id, BlockId position) {
  at(id).next = position;
  at(id).prev = at(position).prev;
  at(at(position).prev).next = id;
  at(position).prev = id;
  ++num_free_;
}

void BlockManager::acquire(BlockId id) {
  if (at(id).references++ == 0) unlink(id);
}

// The least recently used free block, evicted from the cache.
BlockId BlockManager::pop_free() {
  const BlockId id = at(num_blocks()).next;
  evict(id);
  acquire(id);
  return id;
}

void BlockManager::release(BlockId id) {
  check_invariant(at(id).references > 0, "block released more often than acquired");
  if (--at(id).references > 0) return;
  const BlockId head = num_blocks();
  link_before(id, at(id).block_hash != 0 ? head : at(head).next);
}

/* === prefix cache === */

void BlockManager::evict(BlockId id) {
  if (at(id).block_hash == 0) return;
  cache_.erase(id);
  at(id).block_hash = 0;
}

BlockManager::Probe BlockManager::probe_for(const Sequence& sequence, int32_t block,
                                            uint64_t parent_hash) const {
  const TokenId* tokens = &sequence.tokens[static_cast<size_t>(block * block_size_)];
  uint64_t hash = mix(parent_hash ^ sequence.salt[0]) ^ mix(sequence.salt[1] + 1);
  for (int32_t i = 0; i < block_size_; ++i) {
    hash = mix(hash + 0x9e3779b97f4a7c15ULL + static_cast<uint32_t>(tokens[i]));
  }
  return {parent_hash, hash, &sequence.salt, tokens};
}

bool BlockManager::holds(BlockId id, const Probe& probe) const {
  const Block& block = at(id);
  return block.table_hash == probe.table_hash && block.parent_hash == probe.parent_hash &&
         block.salt == *probe.salt &&
         std::equal(probe.tokens, probe.tokens + block_size_, tokens_of(id));
}

std::vector<BlockId> BlockManager::find_prefix(const Sequence& sequence, int32_t num_tokens) const {
  std::vector<BlockId> prefix;
  if (!caching_) return prefix;
  const int32_t limit = num_tokens / block_size_;
  for (uint64_t parent_hash = 0; static_cast<int32_t>(prefix.size()) < limit;) {
    const auto block = static_cast<int32_t>(prefix.size());
    const auto hit = cache_.find(probe_for(sequence, block, parent_hash));
    if (hit == cache_.end()) break;
    prefix.push_back(*hit);
    parent_hash = at(*hit).block_hash;
  }
  return prefix;
}

bool BlockManager::allocate(Sequence& sequence, int32_t max_tokens, int32_t headroom) {
  check_invariant(sequence.blocks.empty() && sequence.num_computed == 0,
                  "allocate() for a sequence with blocks");
  int32_t limit = std::min(sequence.num_tokens() - 1, sequence.num_settled);
  if (sequence.num_scored < sequence.num_to_score) limit = std::min(limit, sequence.num_scored);
  std::vector<BlockId> cached = find_prefix(sequence, limit);
  const int32_t num_computed = static_cast<int32_t>(cached.size()) * block_size_;
  const int32_t expired = sequence.pin ? 0 : window_.num_expired(num_computed);
  const auto held = std::count_if(cached.begin() + expired, cached.end(),
                                  [&](BlockId id) { return at(id).references > 0; });
  const int32_t num_pending = sequence.num_tokens() - num_computed;
  const int32_t wanted = std::min(num_blocks_for(sequence.num_tokens()) - expired,
                                  max_blocks(sequence, sequence.num_tokens(), num_pending));
  if (wanted - held + headroom > num_free_) return false;
  const int32_t num_held = std::min(sequence.num_tokens(), num_computed + max_tokens);
  cached.reserve(static_cast<size_t>(num_blocks_for(num_held)));  // nothing below allocates memory
  for (BlockId id : cached) acquire(id);
  sequence.parent_hash = cached.empty() ? 0 : at(cached.back()).block_hash;
  sequence.num_hashed_blocks = static_cast<int32_t>(cached.size());
  sequence.num_computed = num_computed;
  sequence.blocks = std::move(cached);
  free_expired(sequence);
  return grow(sequence, num_held);
}

bool BlockManager::grow(Sequence& sequence, int32_t num_tokens) {
  const auto capacity = static_cast<int64_t>(sequence.blocks.size()) * block_size_;
  if (num_tokens <= capacity) return true;  // almost always, so without a division
  const int32_t missing = num_blocks_for(num_tokens) - static_cast<int32_t>(sequence.blocks.size());
  if (missing > num_free_) return false;
  const size_t owned = sequence.blocks.size();
  sequence.blocks.resize(owned + static_cast<size_t>(missing));
  for (size_t i = owned; i < sequence.blocks.size(); ++i) sequence.blocks[i] = pop_free();
  return true;
}

void BlockManager::free_expired(Sequence& sequence) {
  if (sequence.pin) return;
  int32_t expired = window_.num_expired(sequence.earliest_query());
  if (caching_) expired = std::min(expired, sequence.num_hashed_blocks);  // if memory ran out
  for (int32_t i = expired; i-- > sequence.num_expired_blocks;) {
    BlockId& block = sequence.blocks[static_cast<size_t>(i)];
    release(block);
    block = null_block();
  }
  sequence.num_expired_blocks = std::max(sequence.num_expired_blocks, expired);
}

void BlockManager::cache_full_blocks(Sequence& sequence) {
  if (!caching_) return;
  const int32_t num_final = std::min(sequence.num_computed, sequence.num_settled);
  try {
    while ((sequence.num_hashed_blocks + 1) * block_size_ <= num_final) cache_next_block(sequence);
  } catch (const std::bad_alloc&) {  // the next call goes on
  }
}

// Enters the first block that is not hashed into the cache, unless the same was computed before.
// Returns the cached one. Changes nothing if memory runs out.
BlockId BlockManager::cache_next_block(Sequence& sequence) {
  const Probe content = probe_for(sequence, sequence.num_hashed_blocks, sequence.parent_hash);
  const BlockId own = sequence.blocks[static_cast<size_t>(sequence.num_hashed_blocks)];
  const auto twin = cache_.find(content);
  const BlockId cached = twin == cache_.end() ? own : *twin;
  if (twin == cache_.end()) {
    evict(own);
    std::copy_n(content.tokens, block_size_, tokens_of(own));
    at(own).parent_hash = content.parent_hash;
    at(own).table_hash = content.table_hash;
    at(own).salt = *content.salt;
    cache_.insert(own);
    at(own).block_hash = next_block_hash_++;
  }
  sequence.parent_hash = at(cached).block_hash;
  ++sequence.num_hashed_blocks;
  return cached;
}

void BlockManager::free(Sequence& sequence) {
  while (sequence.num_held_blocks() > 0) {
    release(sequence.blocks.back());
    sequence.blocks.pop_back();
  }
  sequence.blocks.clear();
  sequence.num_expired_blocks = 0;
  sequence.num_computed = 0;
  sequence.num_hashed_blocks = 0;
  sequence.parent_hash = 0;
}

void BlockManager::clear_cache() {
  for (BlockId id = 0; id < num_blocks(); ++id) {
    if (at(id).references == 0) evict(id);
  }
}

bool BlockManager::restore(Sequence& sequence, const FillBlocks& fill) {
  check_invariant(sequence.blocks.empty(), "restore() of a sequence with blocks");
  sequence.blocks = find_prefix(sequence, sequence.num_tokens());
  for (BlockId id : sequence.blocks) acquire(id);
  const auto first = static_cast<int32_t>(sequence.blocks.size());
  try {
    const bool fits = grow(sequence, sequence.num_tokens() / block_size_ * block_size_);
    if (fits) {
      fill(first, std::span(sequence.blocks).subspan(static_cast<size_t>(first)));
      const auto full = caching_ ? static_cast<int32_t>(sequence.blocks.size()) : 0;
      while (sequence.num_hashed_blocks < full) cache_next_block(sequence);
    }
    free(sequence);
    return fits;
  } catch (...) {
    free(sequence);
    throw;
  }
}

/* === pins === */

bool BlockManager::can_pin(int32_t num_blocks, std::span<const BlockId> cached) const {
  const auto pinned =
      std::count_if(cached.begin(), cached.end(), [&](BlockId id) { return at(id).pins > 0; });
  return num_pinned_ + num_blocks - pinned <= max_pinned_;
}

bool BlockManager::pin(int64_t id, std::span<const BlockId> ids) {
  check_invariant(!pins_.contains(id), "the id of a pin is taken");
  if (!can_pin(static_cast<int32_t>(ids.size()), ids)) return false;
  pins_.emplace(id, std::vector(ids.begin(), ids.end()));
  for (BlockId block : ids) {
    acquire(block);
    num_pinned_ += at(block).pins++ == 0;
  }
  return true;
}

bool BlockManager::pin_prompt(Sequence& sequence) try {
  std::vector<BlockId> ids;
  const int32_t full = caching_ ? sequence.prompt_len / block_size_ : 0;
  sequence.num_hashed_blocks = 0;
  sequence.parent_hash = 0;
  while (sequence.num_hashed_blocks < full) ids.push_back(cache_next_block(sequence));
  return pin(sequence.id, ids);
} catch (const std::bad_alloc&) {
  return false;
}

void BlockManager::unpin(int64_t id) {
  const auto entry = pins_.find(id);
  if (entry == pins_.end()) return;
  std::for_each(entry->second.rbegin(), entry->second.rend(), [&](BlockId block) {
    num_pinned_ -= --at(block).pins == 0;
    release(block);
  });
  pins_.erase(entry);
}

int32_t BlockManager::num_pinned(int64_t id) const {
  const auto entry = pins_.find(id);
  return entry == pins_.end() ? 0 : static_cast<int32_t>(entry->second.size());
}

void BlockManager::check_integrity(std::span<const Sequence* const> sequences) const {
  std::vector<int32_t> references(blocks_.size(), 0);
  for (const Sequence* sequence : sequences) {
    const int32_t expired = sequence->num_expired_blocks;
    check_invariant(expired <= window_.num_expired(sequence->earliest_query()),
                    "a block was freed that a window still holds");
    for (size_t i = 0; i < sequence->blocks.size(); ++i) {
      const BlockId id = sequence->blocks[i];
      check_invariant((id == null_block()) == (static_cast<int32_t>(i) < expired),
                      "expired blocks and null blocks disagree");
      if (id != null_block()) ++references[static_cast<size_t>(id)];
    }
    check_invariant(!caching_ || expired <= sequence->num_hashed_blocks,
                    "a block was freed before it was cached");
    const auto capacity = static_cast<int32_t>(sequence->blocks.size()) * block_size_;
    check_invariant(sequence->num_computed <= capacity, "computed tokens without a block");
    check_invariant(sequence->num_hashed_blocks * block_size_ <= sequence->num_computed,
                    "hashed a block that is not computed");
  }
  std::vector<int32_t> pins(blocks_.size(), 0);
  for (const auto& [pin, ids] : pins_) {
    for (BlockId id : ids) {
      ++references[static_cast<size_t>(id)];
      ++pins[static_cast<size_t>(id)];
    }
  }
  int32_t free_blocks = 0;
  int32_t pinned = 0;
  size_t cached = 0;
  for (BlockId id = 0; id < num_blocks(); ++id) {
    const Block& block = at(id);
    check_invariant(block.references == references[static_cast<size_t>(id)],
                    "wrong reference count");
    check_invariant((block.references == 0) == (block.next != kNoBlock),
                    "free list and count disagree");
    check_invariant(block.pins == pins[static_cast<size_t>(id)], "wrong number of pins");
    check_invariant(block.pins == 0 || block.block_hash != 0, "a pinned block is not cached");
    free_blocks += block.references == 0;
    pinned += block.pins > 0;
    cached += block.block_hash != 0;
    check_invariant((block.block_hash != 0) == cache_.contains(id),
                    "block_hash and cache disagree");
    check_invariant(block.block_hash < next_block_hash_ && block.parent_hash < next_block_hash_,
                    "block_hash was never given out");
  }
  check_invariant(free_blocks == num_free_, "wrong number of free blocks");
  check_invariant(pinned == num_pinned_ && pinned <= max_pinned_, "wrong number of pinned blocks");
  check_invariant(cached == cache_.size(), "cache holds unknown blocks");
  int32_t listed = 0;
  for (BlockId id = at(num_blocks()).next; id != num_blocks(); id = at(id).next) {
    check_invariant(++listed <= num_free_, "free list has a cycle");
  }
  check_invariant(listed == num_free_, "free list is incomplete");
}

}  // namespace s1
