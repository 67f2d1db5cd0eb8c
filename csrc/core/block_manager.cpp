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

BlockManager::BlockManager(int32_t num_blocks, int32_t block_size, bool enable_prefix_caching)
    : block_size_(block_size), caching_(enable_prefix_caching), cache_(0, Hash{this}, Equal{this}) {
  if (num_blocks < 1) throw std::invalid_argument("num_blocks must be positive");
  if (block_size < 1) throw std::invalid_argument("block_size must be positive");
  blocks_.resize(static_cast<size_t>(num_blocks) + 1);
  tokens_.resize(static_cast<size_t>(num_blocks) * static_cast<size_t>(block_size));
  at(num_blocks).prev = at(num_blocks).next = num_blocks;
  for (BlockId id = 0; id < num_blocks; ++id) link_before(id, num_blocks);
}

/* === free list: circular, the sentinel is the last block === */

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

// The least recently used free block, its content forgotten.
BlockId BlockManager::take_free() {
  const BlockId id = at(num_blocks()).next;
  forget(id);
  acquire(id);
  return id;
}

void BlockManager::drop(BlockId id) {
  check(at(id).references > 0, "block dropped more often than acquired");
  if (--at(id).references > 0) return;
  const BlockId head = num_blocks();
  link_before(id, at(id).content != 0 ? head : at(head).next);
}

/* === prefix cache === */

void BlockManager::forget(BlockId id) {
  if (at(id).content == 0) return;
  cache_.erase(id);
  at(id).content = 0;
}

BlockManager::Probe BlockManager::probe(const Sequence& sequence, int32_t block,
                                        uint64_t parent) const {
  const TokenId* tokens = &sequence.tokens[static_cast<size_t>(block * block_size_)];
  uint64_t hash = mix(parent ^ sequence.salt[0]) ^ mix(sequence.salt[1] + 1);
  for (int32_t i = 0; i < block_size_; ++i) {
    hash = mix(hash + 0x9e3779b97f4a7c15ULL + static_cast<uint32_t>(tokens[i]));
  }
  return {parent, hash, &sequence.salt, tokens};
}

bool BlockManager::holds(BlockId id, const Probe& probe) const {
  const Block& block = at(id);
  return block.hash == probe.hash && block.parent == probe.parent && block.salt == *probe.salt &&
         std::equal(probe.tokens, probe.tokens + block_size_, tokens_of(id));
}

std::vector<BlockId> BlockManager::match(const Sequence& sequence) const {
  std::vector<BlockId> found;
  if (!caching_) return found;
  const int32_t limit = (sequence.num_tokens() - 1) / block_size_;
  for (uint64_t parent = 0; static_cast<int32_t>(found.size()) < limit;) {
    const auto hit = cache_.find(probe(sequence, static_cast<int32_t>(found.size()), parent));
    if (hit == cache_.end()) break;
    found.push_back(*hit);
    parent = at(*hit).content;
  }
  return found;
}

bool BlockManager::admit(Sequence& sequence, int32_t headroom) {
  check(sequence.blocks.empty() && sequence.num_computed == 0, "admitted with blocks");
  std::vector<BlockId> cached = match(sequence);
  const auto held = std::count_if(cached.begin(), cached.end(),
                                  [&](BlockId id) { return at(id).references > 0; });
  if (blocks_for(sequence.num_tokens()) - held + headroom > num_free_) return false;
  for (BlockId id : cached) acquire(id);
  sequence.chain = cached.empty() ? 0 : at(cached.back()).content;
  sequence.num_registered = static_cast<int32_t>(cached.size());
  sequence.num_computed = sequence.num_registered * block_size_;
  sequence.blocks = std::move(cached);
  return grow(sequence, sequence.num_tokens());
}

bool BlockManager::grow(Sequence& sequence, int32_t num_tokens) {
  const int32_t missing = blocks_for(num_tokens) - static_cast<int32_t>(sequence.blocks.size());
  if (missing > num_free_) return false;
  for (int32_t i = 0; i < missing; ++i) sequence.blocks.push_back(take_free());
  return true;
}

void BlockManager::commit(Sequence& sequence) {
  if (!caching_) return;
  while ((sequence.num_registered + 1) * block_size_ <= sequence.num_computed) {
    const Probe content = probe(sequence, sequence.num_registered, sequence.chain);
    const BlockId own = sequence.blocks[static_cast<size_t>(sequence.num_registered)];
    const auto twin = cache_.find(content);
    if (twin != cache_.end()) {
      sequence.chain = at(*twin).content;  // computed twice: the first one stands for both
    } else {
      std::copy_n(content.tokens, block_size_, tokens_of(own));
      at(own).parent = content.parent;
      at(own).hash = content.hash;
      at(own).salt = *content.salt;
      at(own).content = next_content_++;
      cache_.insert(own);
      sequence.chain = at(own).content;
    }
    ++sequence.num_registered;
  }
}

void BlockManager::release(Sequence& sequence) {
  while (!sequence.blocks.empty()) {
    drop(sequence.blocks.back());
    sequence.blocks.pop_back();
  }
  sequence.num_computed = 0;
  sequence.num_registered = 0;
  sequence.chain = 0;
}

void BlockManager::clear_cache() {
  for (BlockId id = 0; id < num_blocks(); ++id) {
    if (at(id).references == 0) forget(id);
  }
}

void BlockManager::check_integrity(std::span<const Sequence* const> sequences) const {
  std::vector<int32_t> references(blocks_.size(), 0);
  for (const Sequence* sequence : sequences) {
    for (BlockId id : sequence->blocks) ++references[static_cast<size_t>(id)];
    const auto capacity = static_cast<int32_t>(sequence->blocks.size()) * block_size_;
    check(sequence->num_computed <= capacity, "computed tokens without a block");
    check(sequence->num_registered * block_size_ <= sequence->num_computed,
          "registered a block that is not computed");
  }
  int32_t free_blocks = 0;
  size_t cached = 0;
  for (BlockId id = 0; id < num_blocks(); ++id) {
    const Block& block = at(id);
    check(block.references == references[static_cast<size_t>(id)], "wrong reference count");
    check((block.references == 0) == (block.next != kNoBlock), "free list and count disagree");
    free_blocks += block.references == 0;
    cached += block.content != 0;
    check((block.content != 0) == cache_.contains(id), "content and cache disagree");
    check(block.content < next_content_ && block.parent < next_content_, "content id from nowhere");
  }
  check(free_blocks == num_free_, "wrong number of free blocks");
  check(cached == cache_.size(), "cache holds unknown blocks");
  int32_t listed = 0;
  for (BlockId id = at(num_blocks()).next; id != num_blocks(); id = at(id).next) {
    check(++listed <= num_free_, "free list has a cycle");
  }
  check(listed == num_free_, "free list is incomplete");
}

}  // namespace s1
