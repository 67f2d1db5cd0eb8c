#include "block_manager.hpp"

#include <algorithm>

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
                           int32_t window, int32_t max_step_tokens)
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

std::vector<BlockId> BlockManager::find_prefix(const Sequence& sequence) const {
  std::vector<BlockId> prefix;
  if (!caching_) return prefix;
  const int32_t limit = std::min(sequence.num_tokens() - 1, sequence.num_settled) / block_size_;
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
  std::vector<BlockId> cached = find_prefix(sequence);
  const int32_t num_computed = static_cast<int32_t>(cached.size()) * block_size_;
  const int32_t expired = window_.num_expired(num_computed);
  const auto held = std::count_if(cached.begin() + expired, cached.end(),
                                  [&](BlockId id) { return at(id).references > 0; });
  const int32_t wanted =
      std::min(num_blocks_for(sequence.num_tokens()) - expired,
               window_.max_blocks(sequence.num_tokens(), sequence.num_tokens() - num_computed));
  if (wanted - held + headroom > num_free_) return false;
  for (BlockId id : cached) acquire(id);
  sequence.parent_hash = cached.empty() ? 0 : at(cached.back()).block_hash;
  sequence.num_hashed_blocks = static_cast<int32_t>(cached.size());
  sequence.num_computed = num_computed;
  sequence.blocks = std::move(cached);
  free_expired(sequence);
  return grow(sequence, std::min(sequence.num_tokens(), num_computed + max_tokens));
}

bool BlockManager::grow(Sequence& sequence, int32_t num_tokens) {
  const int32_t missing = num_blocks_for(num_tokens) - static_cast<int32_t>(sequence.blocks.size());
  if (missing > num_free_) return false;
  for (int32_t i = 0; i < missing; ++i) sequence.blocks.push_back(pop_free());
  return true;
}

void BlockManager::free_expired(Sequence& sequence) {
  const int32_t expired = window_.num_expired(sequence.earliest_query());
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
  while ((sequence.num_hashed_blocks + 1) * block_size_ <= num_final) {
    const Probe content = probe_for(sequence, sequence.num_hashed_blocks, sequence.parent_hash);
    const BlockId own = sequence.blocks[static_cast<size_t>(sequence.num_hashed_blocks)];
    const auto twin = cache_.find(content);
    if (twin != cache_.end()) {
      sequence.parent_hash = at(*twin).block_hash;  // computed twice: continue from the first
    } else {
      std::copy_n(content.tokens, block_size_, tokens_of(own));
      at(own).parent_hash = content.parent_hash;
      at(own).table_hash = content.table_hash;
      at(own).salt = *content.salt;
      at(own).block_hash = next_block_hash_++;
      cache_.insert(own);
      sequence.parent_hash = at(own).block_hash;
    }
    ++sequence.num_hashed_blocks;
  }
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
  int32_t free_blocks = 0;
  size_t cached = 0;
  for (BlockId id = 0; id < num_blocks(); ++id) {
    const Block& block = at(id);
    check_invariant(block.references == references[static_cast<size_t>(id)],
                    "wrong reference count");
    check_invariant((block.references == 0) == (block.next != kNoBlock),
                    "free list and count disagree");
    free_blocks += block.references == 0;
    cached += block.block_hash != 0;
    check_invariant((block.block_hash != 0) == cache_.contains(id),
                    "block_hash and cache disagree");
    check_invariant(block.block_hash < next_block_hash_ && block.parent_hash < next_block_hash_,
                    "block_hash was never given out");
  }
  check_invariant(free_blocks == num_free_, "wrong number of free blocks");
  check_invariant(cached == cache_.size(), "cache holds unknown blocks");
  int32_t listed = 0;
  for (BlockId id = at(num_blocks()).next; id != num_blocks(); id = at(id).next) {
    check_invariant(++listed <= num_free_, "free list has a cycle");
  }
  check_invariant(listed == num_free_, "free list is incomplete");
}

}  // namespace s1
