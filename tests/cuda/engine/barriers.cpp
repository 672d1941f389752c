// What device code says to the other threads (cuda_on_cpu/threads.h, cooperative_groups.h).
#include <algorithm>
#include <cstring>
#include <memory>

#include "grid.h"
#include "schedule.h"

namespace cuda_on_cpu {
namespace {

uint64_t combined(WarpOp op, uint64_t a, uint64_t b) {
  switch (op) {
    case WarpOp::kAdd: return uint32_t(a + b);
    case WarpOp::kMin: return std::min(a, b);
    case WarpOp::kMax: return std::max(a, b);
    case WarpOp::kMinSigned: return uint32_t(std::min(int32_t(a), int32_t(b)));
    case WarpOp::kMaxSigned: return uint32_t(std::max(int32_t(a), int32_t(b)));
    case WarpOp::kAll:
    case WarpOp::kAnd: return a & b;
    case WarpOp::kXor: return a ^ b;
    default: return a | b;
  }
}

void note_meeting(Warp& warp, unsigned met) {
  ++now;
  if (met == warp.lanes) {
    warp.last = now;
    return;
  }
  if (!warp.met) {
    warp.met = std::make_unique<Meetings>();
  }
  // Each now also knows what the others knew.
  uint32_t known[kLanes] = {};
  for (int i = 0; i < kLanes; ++i) {
    if (!(met >> i & 1)) continue;
    for (int j = 0; j < kLanes; ++j) known[j] = std::max(known[j], warp.met->at[i][j]);
  }
  for (int i = 0; i < kLanes; ++i) {
    if (met >> i & 1) known[i] = now;
  }
  for (int i = 0; i < kLanes; ++i) {
    if (met >> i & 1) std::memcpy(warp.met->at[i], known, sizeof known);
  }
}

// Lets the lanes of a warp operation go on once all of them are there.
void complete(Warp& warp, const Thread& one) {
  const unsigned lanes = one.mask & warp.lanes & ~warp.exited;
  if (lanes & ~warp.waiting) return;
  uint64_t values[kLanes];
  uint64_t all = 0;
  bool first = true;
  for (int i = 0; i < kLanes; ++i) {
    if (!(lanes >> i & 1)) continue;
    const Thread& thread = warp.first[i];
    if (thread.mask != one.mask || thread.op != one.op) return;
    values[i] = thread.op == WarpOp::kBallot ? thread.value << i : thread.value;
    all = first ? values[i] : combined(one.op, all, values[i]);
    first = false;
  }
  if (one.op == WarpOp::kBarrier) note_meeting(warp, lanes);
  for (int i = 0; i < kLanes; ++i) {
    if (!(lanes >> i & 1)) continue;
    Thread& thread = warp.first[i];
    if (thread.op != WarpOp::kShuffle) {
      thread.value = all;
      continue;
    }
    const bool there = lanes >> thread.from & 1;
    thread.value = there ? values[thread.from] : ~uint64_t(0);
    if (!there) thread.from = -1;
  }
  warp.waiting &= ~lanes;
  unsigned of[kLanes];
  size_t count = 0;
  for (int i = 0; i < kLanes; ++i) {
    if (lanes >> i & 1) of[count++] = unsigned(i);
  }
  ready.push_all(count, [&](size_t i) { return warp.first + of[i]; });
}

Warp& warp_of(const Thread& thread) { return thread.block->warps[thread.rank / kLanes]; }

}  // namespace

void leave_warp() {
  Warp& warp = warp_of(*running);
  warp.exited |= 1u << running->rank % kLanes;
  for (int i = 0; i < kLanes; ++i) {
    if (warp.waiting >> i & 1) complete(warp, warp.first[i]);
  }
}

int block_barrier(BlockVote vote, int predicate) {
  Block& block = *running->block;
  const void* const where = __builtin_return_address(0);
  if (block.arrived == 0) {
    block.vote = vote;
    block.votes = 0;
  } else if (block.vote != vote) {
    report_and_stop("divergent barrier: one __syncthreads has met another kind of __syncthreads", where);
  }
  block.votes += predicate != 0;
  if (++block.arrived == launching->threads) {
    block.arrived = 0;
    block.last = ++now;
    ++block.barriers;
    const bool all = block.votes == int(launching->threads);
    block.result = vote == BlockVote::kCount ? block.votes : vote == BlockVote::kAnd ? all : block.votes > 0;
    ready.push_all(launching->threads, [&](size_t i) { return block.first + i; });
    let_others_run();
  } else {
    wait(State::kAtBlockBarrier, where);
  }
  return block.result;
}

uint64_t warp_exchange(WarpOp op, unsigned mask, uint64_t value, int from) {
  Thread& self = *running;
  Warp& warp = warp_of(self);
  const void* const where = __builtin_return_address(0);
  const unsigned own = 1u << self.rank % kLanes;
  if (!(mask & own)) report_and_stop("a warp operation's mask must name the calling lane", where);
  self.op = op;
  self.mask = mask;
  self.value = value;
  self.from = from;
  self.state = State::kAtWarp;
  self.waits_at = where;
  warp.waiting |= own;
  complete(warp, self);
  let_others_run();
  if (self.from < 0) report("a shuffle reads from a lane that takes no part in it", where);
  return self.value;
}

int lane() { return int(running->rank) % kLanes; }

Extent extent(Scope scope) {
  const Block& block = *running->block;
  if (scope == Scope::kGrid) {
    const unsigned rank = (block.index.z * gridDim.y + block.index.y) * gridDim.x + block.index.x;
    return {gridDim, block.index, rank, launching->blocks};
  }
  if (scope == Scope::kBlock) return {dim3(1), dim3(0, 0, 0), 0, 1};
  const dim3 size = launching->cluster;
  const dim3 index(block.index.x % size.x, block.index.y % size.y, block.index.z % size.z);
  return {size, index, block.cluster_rank, launching->cluster_blocks};
}

bool grid_is_cooperative() { return launching->cooperative; }

void grid_barrier() {
  const void* const where = __builtin_return_address(0);
  if (!launching->cooperative) report_and_stop("a barrier of the grid needs a cooperative launch", where);
  if (++arrived_at_grid < threads.size()) return wait(State::kAtGrid, where);
  arrived_at_grid = 0;
  ++grid_barriers;
  grid_last = ++now;
  ready.push_all(threads.size(), [](size_t i) { return &threads[i]; });
  let_others_run();
}

void cluster_arrive() {
  Thread& self = *running;
  Cluster& cluster = *self.block->cluster;
  if (self.arrived) report_and_stop("the cluster's barrier_arrive without a barrier_wait", __builtin_return_address(0));
  self.arrived = true;
  self.arrival = cluster.phase;
  between = true;
  if (++cluster.arrived < launching->cluster_blocks * launching->threads) return;
  cluster.arrived = 0;
  ++cluster.phase;
  cluster.before = cluster.seen;
  cluster.seen = ++now;
  between = false;
  ready.push_all(cluster.waiting.size(), [&](size_t i) { return cluster.waiting[i]; });
  cluster.waiting.clear();
}

void cluster_wait() {
  Thread& self = *running;
  Cluster& cluster = *self.block->cluster;
  const void* const where = __builtin_return_address(0);
  if (!self.arrived) report_and_stop("the cluster's barrier_wait without a barrier_arrive", where);
  if (cluster.phase == self.arrival) {
    cluster.waiting.push_back(&self);
    wait(State::kAtCluster, where);
  }
  self.arrived = false;
  between = false;
  self.cluster_seen = cluster.seen;
  self.cluster_before = cluster.before;
}

void* in_block_of_cluster(void* own_shared, unsigned rank) {
  const void* const where = __builtin_return_address(0);
  const Block& block = *running->block;
  const auto offset = size_t(static_cast<unsigned char*>(own_shared) - block.shared.begin);
  if (rank >= launching->cluster_blocks) report_and_stop("map_shared_rank must name a block of the cluster", where);
  // Without bytes of its own an address of a larger map may lie before the block's memory; accesses are checked.
  return block.cluster->first[rank].shared.begin + offset;
}

unsigned rank_of_owner(const void* shared) {
  const auto slot = size_t(static_cast<const unsigned char*>(shared) - shared_memory) / shared_pitch;
  return slot < wave.size() ? wave[slot].cluster_rank : 0;
}

unsigned thread_rank() { return running->rank; }

unsigned block_threads() { return launching->threads; }

}  // namespace cuda_on_cpu

void* cuda_on_cpu_block_memory() { return cuda_on_cpu::running->block->shared.begin; }
