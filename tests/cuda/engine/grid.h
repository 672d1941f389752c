// The threads of a launch, and what they wait for. All of it belongs to the one launch that is under way.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cooperative_groups.h"
#include "memory.h"

namespace cuda_on_cpu {

constexpr int kLanes = 32;

struct Block;
struct Cluster;

enum class State { kReady, kAtBlockBarrier, kAtWarp, kAtCluster, kAtGrid, kExited };

struct Thread {
  void* top;             // of its stack, while it does not run
  unsigned char* stack;  // lowest address
  Block* block;
  uint3 index;
  uint32_t rank;  // in the block
  uint32_t id;    // in the grid
  State state;
  const void* waits_at;     // code address
  bool arrived;             // at the cluster's barrier, without having waited yet
  uint32_t arrival;         // the phase it arrived at
  uint32_t cluster_seen;    // when the last cluster barrier it waited at was complete
  uint32_t cluster_before;  // and the one before
  uint32_t atomics;         // since it last let others run
  WarpOp op;                // at kAtWarp
  unsigned mask;
  int from;
  uint64_t value;
};

// When each lane last met each other one; only where a barrier named some lanes of the warp.
struct Meetings {
  uint32_t at[kLanes][kLanes];
};

struct Warp {
  Thread* first;
  unsigned lanes, exited, waiting;  // bits
  uint32_t last;                    // when a barrier of all lanes was last complete
  std::unique_ptr<Meetings> met;
};

struct Block {
  dim3 index;
  unsigned rank;  // in the grid
  Cluster* cluster;
  unsigned cluster_rank;
  Thread* first;
  unsigned arrived, exited;
  BlockVote vote;
  int votes;
  int result;
  uint32_t last;  // when its barrier was last complete
  uint32_t barriers;
  Region shared;
  Access remote;  // the last access of other blocks of the cluster to its shared memory
  std::vector<Warp> warps;
};

struct Cluster {
  Block* first;
  unsigned arrived, phase;
  uint32_t seen, before;  // when the barrier was last complete, and the time before
  std::vector<Thread*> waiting;
};

// How many of each a launch had, a block or cluster the most.
struct Barriers {
  uint64_t block, cluster, grid;
};

struct Launching {
  const void* kernel;
  void (*run_thread)(const void*);
  const void* arguments;
  size_t argument_bytes;
  dim3 grid, block, cluster;
  unsigned blocks, threads, cluster_blocks;  // of the grid; of a block; of a cluster
  bool cooperative;
  size_t shared;
};

enum class Order { kForward, kReversed, kRandom };

// Runs all of it. False where a thread was stopped or could not go on; the report says why.
bool run_grid(const Launching& launching, Order order, uint32_t seed, Barriers* barriers);

// Of the launch under way:
extern const Launching* launching;
extern Thread* running;     // null while the host's code runs
extern uint32_t grid_last;  // when its barrier was last complete; at first the launch's start
extern uint32_t grid_start;
extern uint32_t now;  // counts the barriers completed
extern bool between;  // the running thread's Access::between

extern std::vector<Thread> threads;
extern unsigned arrived_at_grid;
extern uint64_t grid_barriers;
// The blocks alive, and the memory of block i, from shared_memory + i * shared_pitch on.
extern std::vector<Block> wave;
extern unsigned char* shared_memory;
extern size_t shared_pitch;

extern unsigned char *stacks, *stacks_end;

// A thread's id is its block's rank and its own.
constexpr int kRankBits = 10;
constexpr unsigned kMostBlocks = 1u << (29 - kRankBits);
inline unsigned block_of(uint32_t id) { return id >> kRankBits; }
inline unsigned rank_of(uint32_t id) { return id & ((1u << kRankBits) - 1); }
inline bool same_cluster(unsigned block, unsigned other) {
  return block / launching->cluster_blocks == other / launching->cluster_blocks;
}

std::string name_of(const Thread& thread);
std::string name_of_thread(uint32_t id);
std::string name_of_block(unsigned rank);
dim3 block_index(unsigned rank);

// Also for a volatile access; now and then others run first, for it may be the loop that waits for them.
void touch_atomically(const void* address, unsigned bytes, unsigned kind, const void* where);

[[noreturn]] void stop();  // ends the launch from within one of its threads

}  // namespace cuda_on_cpu
