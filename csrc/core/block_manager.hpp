// Which KV blocks belong to which sequence: reference counts, and a prefix cache over full blocks.
//
// Owns block ids only; their memory belongs to the KVCache of the runner. A cached block
// has a `block_hash` that identifies its tokens, the request's salt and all blocks before it, as in
// other engines. Here it is exact: a number that is never reused, given out when the block enters
// the cache. Digests (`table_hash`) only find candidates in the table and tokens decide, so two
// different prefixes never share a block.
//
//   free, not cached   front of the free list, used first
//   free, cached       back of the free list: the least recently released is evicted first
//   in use             references > 0, in no list
//   pinned             cached, and in use by a pin, which no sequence needs
//
// If memory runs out (std::bad_alloc), a call changes nothing, unless it says otherwise.

#pragma once

#include <functional>
#include <span>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "sequence.hpp"
#include "sliding_window.hpp"

namespace s1 {

class BlockManager {
 public:
  // Writes K and V of the blocks `ids`, which are those of a sequence from index `first` on.
  using FillBlocks = std::function<void(int32_t first, std::span<const BlockId> ids)>;

  // Throws std::invalid_argument if a size is not positive. `window`: of every layer, 0 if one has
  // none; `max_step_tokens`: of one sequence in one step; `max_len`: of a sequence, for which pins
  // leave room, 0: nothing can be pinned.
  BlockManager(int32_t num_blocks, int32_t block_size, bool enable_prefix_caching,
               int32_t window = 0, int32_t max_step_tokens = 0, int32_t max_len = 0);
  BlockManager(const BlockManager&) = delete;
  BlockManager& operator=(const BlockManager&) = delete;

  int32_t block_size() const { return block_size_; }
  int32_t num_blocks() const { return static_cast<int32_t>(blocks_.size()) - 1; }
  BlockId null_block() const { return num_blocks(); }  // stands for expired blocks
  int32_t num_free() const { return num_free_; }
  const SlidingWindow& window() const { return window_; }
  int32_t num_blocks_for(int32_t num_tokens) const {
    return (num_tokens + block_size_ - 1) / block_size_;
  }

  // Most blocks that the sequence holds at a time up to a length of `num_tokens`, while it computes
  // up to `num_pending` tokens a step.
  int32_t max_blocks(const Sequence& sequence, int32_t num_tokens, int32_t num_pending) const {
    if (sequence.pin) return num_blocks_for(num_tokens);
    return window_.max_blocks(num_tokens, num_pending);
  }

  // Gives a sequence without blocks the longest cached prefix of its tokens (at least one token
  // stays to be computed, all held ones, and those that are to be scored) and new blocks for up to
  // `max_tokens` tokens after it. Returns false, and changes nothing, if fewer than `headroom`
  // blocks would be left free once it holds all that it needs for its tokens.
  bool allocate(Sequence& sequence, int32_t max_tokens, int32_t headroom);

  // Appends blocks until they hold `num_tokens` tokens. Returns false, and changes nothing, if too
  // few blocks are free.
  bool grow(Sequence& sequence, int32_t num_tokens);

  // Releases the blocks that no further query of the sequence sees. They stay cached, so a prefix
  // is found as long as none of its blocks is evicted.
  void free_expired(Sequence& sequence);

  // Adds blocks that became full and computed to the prefix cache, unless they have held tokens.
  // Never throws: what memory does not suffice for is added by a later call.
  void cache_full_blocks(Sequence& sequence);

  // Releases all blocks of the sequence, the last first, so prefixes outlive their continuations.
  void free(Sequence& sequence);

  // Evicts all cached blocks that nothing holds.
  void clear_cache();

  // The longest cached prefix of the first `num_tokens` tokens of the sequence.
  std::vector<BlockId> find_prefix(const Sequence& sequence, int32_t num_tokens) const;

  // Enters the full blocks of a sequence without blocks into the cache; `fill` writes those that
  // are not there. Evicts others for them. Returns false if too few blocks are free; then, and if
  // `fill` throws, the cache holds none of them that it did not hold before. If memory runs out, it
  // holds the first ones.
  bool restore(Sequence& sequence, const FillBlocks& fill);

  // Holds the cached blocks `ids` until unpin(id), so that nothing evicts them. Returns false, and
  // changes nothing, unless can_pin().
  bool pin(int64_t id, std::span<const BlockId> ids);
  // Pins the full blocks of a sequence's prompt, which is computed, under its id. Enters those into
  // the cache anew that it lost: a block computed twice is cached once, by the other sequence.
  // Returns false, and pins nothing, unless can_pin(), or if memory runs out.
  bool pin_prompt(Sequence& sequence);
  // Does nothing if there is no such pin.
  void unpin(int64_t id);
  // Blocks of a pin; 0 if there is none.
  int32_t num_pinned(int64_t id) const;
  // Blocks of all pins, each counted once.
  int32_t num_pinned() const { return num_pinned_; }
  // Most of them: half the cache, and what the longest sequence leaves. So every sequence runs,
  // whatever is pinned.
  int32_t max_pinned() const { return max_pinned_; }
  // True if `num_blocks` blocks may be pinned, of which those in `cached` exist.
  bool can_pin(int32_t num_blocks, std::span<const BlockId> cached) const;

  // Throws std::logic_error unless counts, lists and cache agree with the pins and the blocks of
  // `sequences`, which are all that hold any. Slow: for tests.
  void check_integrity(std::span<const Sequence* const> sequences) const;

 private:
  struct Block {
    int32_t references = 0;
    int32_t pins = 0;         // of the references
    BlockId prev = kNoBlock;  // free list
    BlockId next = kNoBlock;
    uint64_t block_hash = 0;   // 0: not cached
    uint64_t parent_hash = 0;  // block_hash of the block before it
    uint64_t table_hash = 0;
    Salt salt{};
  };
  // A prefix to look up, in the form that a block would have.
  struct Probe {
    uint64_t parent_hash;
    uint64_t table_hash;
    const Salt* salt;
    const TokenId* tokens;
  };
  struct Hash {
    using is_transparent = void;
    const BlockManager* manager;
    size_t operator()(BlockId id) const {
      return manager->blocks_[static_cast<size_t>(id)].table_hash;
    }
    size_t operator()(const Probe& probe) const { return probe.table_hash; }
  };
  struct Equal {
    using is_transparent = void;
    const BlockManager* manager;
    bool operator()(BlockId a, BlockId b) const { return a == b; }
    bool operator()(const Probe& probe, BlockId id) const { return manager->holds(id, probe); }
    bool operator()(BlockId id, const Probe& probe) const { return manager->holds(id, probe); }
  };

  Block& at(BlockId id) { return blocks_[static_cast<size_t>(id)]; }
  const Block& at(BlockId id) const { return blocks_[static_cast<size_t>(id)]; }
  TokenId* tokens_of(BlockId id) {
    return &tokens_[static_cast<size_t>(id) * static_cast<size_t>(block_size_)];
  }
  const TokenId* tokens_of(BlockId id) const {
    return &tokens_[static_cast<size_t>(id) * static_cast<size_t>(block_size_)];
  }
  Probe probe_for(const Sequence& sequence, int32_t block, uint64_t parent_hash) const;
  bool holds(BlockId id, const Probe& probe) const;
  BlockId cache_next_block(Sequence& sequence);
  void acquire(BlockId id);
  BlockId pop_free();
  void release(BlockId id);
  void evict(BlockId id);
  void unlink(BlockId id);
  void link_before(BlockId id, BlockId position);

  int32_t block_size_;
  bool caching_;
  SlidingWindow window_;
  int32_t num_free_ = 0;
  int32_t num_pinned_ = 0;
  int32_t max_pinned_ = 0;
  uint64_t next_block_hash_ = 1;
  std::vector<Block> blocks_;    // [num_blocks + 1], the null block is the head of the free list
  std::vector<TokenId> tokens_;  // [num_blocks, block_size] tokens of cached blocks
  std::unordered_set<BlockId, Hash, Equal> cache_;
  std::unordered_map<int64_t, std::vector<BlockId>> pins_;
};

}  // namespace s1
