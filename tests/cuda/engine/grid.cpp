#include "grid.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "fiber.h"
#include "schedule.h"

namespace cuda_on_cpu {

const Launching* launching = nullptr;
uint32_t grid_last = 1, grid_start = 1, now = 1;
std::vector<Thread> threads;
std::vector<Block> wave;
unsigned arrived_at_grid = 0;
uint64_t grid_barriers = 0;
unsigned char* shared_memory = nullptr;
size_t shared_pitch = 1;
unsigned char *stacks = nullptr, *stacks_end = nullptr;

namespace {

constexpr unsigned kThreadsAtOnce = 16384;  // of a launch whose blocks need not be alive together
constexpr unsigned kMostThreads = 1 << 18;

// Address space that grows and is never given back.
class Arena {
 public:
  unsigned char* reserve(size_t bytes) {
    if (bytes <= bytes_) return begin_;
    if (begin_) munmap(begin_, bytes_);
    void* const mapping =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    begin_ = mapping == MAP_FAILED ? nullptr : static_cast<unsigned char*>(mapping);
    bytes_ = begin_ ? bytes : 0;
    if (begin_) madvise(begin_, bytes, MADV_NOHUGEPAGE);  // a stack touches a page or two of its many
    return begin_;
  }

 private:
  unsigned char* begin_ = nullptr;
  size_t bytes_ = 0;
};

Arena stack_arena, shared_arena, written_arena, cell_arena;

std::vector<Cluster> clusters;
unsigned exited = 0;

void exit_thread() {
  Thread& self = *running;
  Block& block = *self.block;
  self.state = State::kExited;
  self.waits_at = nullptr;
  ++exited;
  idle_turns = 0;
  if (++block.exited == launching->threads && !ordered(block.remote)) {
    report("lifetime: block " + name_of_block(block.rank) + " exits without a barrier of the cluster after " +
               name_of_thread(block.remote.thread) + " touched its shared memory",
           nullptr);
  }
  leave_warp();
}

void thread_main() {
  launching->run_thread(launching->arguments);
  exit_thread();
  let_others_run();
  __builtin_unreachable();
}

std::string name_of(uint3 index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z) + ")";
}

uint3 thread_index(uint32_t rank) {
  const dim3 size = launching->block;
  return {rank % size.x, rank / size.x % size.y, rank / size.x / size.y};
}

// Why nobody can go on.
void report_stuck() {
  const char* const doing[] = {"spin",
                               "wait at __syncthreads",
                               "wait for lanes of their warp",
                               "wait at the cluster's barrier",
                               "wait at the grid's barrier",
                               "exited"};
  constexpr int kStates = 6;
  int blocks = 0;
  for (const Block& block : wave) {
    if (block.exited == launching->threads || ++blocks > 3) continue;
    int count[kStates] = {};
    const Thread* first[kStates] = {};
    const void* where = nullptr;
    for (unsigned i = 0; i < launching->threads; ++i) {
      const Thread& thread = block.first[i];
      const int state = int(thread.state);
      if (!first[state]) first[state] = &thread;
      if (!where) where = thread.waits_at;
      ++count[state];
    }
    std::string text = "divergent barrier: of block " + name_of_block(block.rank);
    const char* separator = " ";
    for (int state = 0; state < kStates; ++state) {
      if (!count[state]) continue;
      text += separator + std::to_string(count[state]) + " " + doing[state] + " (first: thread " +
              name_of(first[state]->index) + ")";
      separator = ", ";
    }
    report(text, where);
  }
}

// The blocks of clusters `which`, all threads at their start.
bool set_up(const std::vector<unsigned>& which, Order order, uint32_t seed) {
  const Launching& how = *launching;
  const size_t blocks = which.size() * how.cluster_blocks, count = blocks * how.threads;
  const size_t cells = cells_of(nullptr, how.shared) + 1;
  shared_pitch = (how.shared + (1 << 16) + 4095) / 4096 * 4096;
  stacks = stack_arena.reserve(count * kStackBytes);
  shared_memory = shared_arena.reserve(blocks * shared_pitch);
  unsigned char* const written = written_arena.reserve(blocks * how.shared + 1);
  unsigned char* const cell_memory = cell_arena.reserve(blocks * cells * sizeof(Cell));
  if (!stacks || !shared_memory || !written || !cell_memory) {
    report("the engine finds no memory for " + std::to_string(count) + " threads", nullptr);
    return false;
  }
  stacks_end = stacks + count * kStackBytes;
  if (how.shared) {
    std::memset(written, 0, blocks * how.shared);
    std::memset(cell_memory, 0, blocks * cells * sizeof(Cell));
  }
  threads.assign(count, {});
  clusters.clear();
  clusters.resize(which.size());
  wave.clear();
  wave.resize(blocks);
  ready.reset(count, order, seed);
  arrived_at_grid = exited = 0;
  for (size_t i = 0; i < blocks; ++i) {
    Block& block = wave[i];
    block.rank = which[i / how.cluster_blocks] * how.cluster_blocks + unsigned(i % how.cluster_blocks);
    block.index = block_index(block.rank);
    block.cluster = &clusters[i / how.cluster_blocks];
    block.cluster_rank = unsigned(i % how.cluster_blocks);
    if (block.cluster_rank == 0) block.cluster->first = &block;
    block.first = &threads[i * how.threads];
    block.shared = {shared_memory + i * shared_pitch,
                    how.shared,
                    "shared memory",
                    true,
                    reinterpret_cast<bool*>(written + i * how.shared),
                    reinterpret_cast<Cell*>(cell_memory) + i * cells};
    std::memset(block.shared.begin, 0xff, how.shared);
    block.warps.resize((how.threads + kLanes - 1) / kLanes);
    for (unsigned w = 0; w < block.warps.size(); ++w) {
      Warp& warp = block.warps[w];
      warp.first = block.first + w * kLanes;
      const unsigned lanes = std::min<unsigned>(how.threads - w * kLanes, kLanes);
      warp.lanes = lanes == kLanes ? ~0u : (1u << lanes) - 1;
    }
    for (unsigned rank = 0; rank < how.threads; ++rank) {
      Thread& thread = block.first[rank];
      thread.block = &block;
      thread.rank = rank;
      thread.index = thread_index(rank);
      thread.id = block.rank << kRankBits | rank;
      thread.stack = stacks + (i * how.threads + rank) * kStackBytes;
      // Tops of stacks a power of 2 apart would fight for the same lines of the cache.
      thread.top = new_fiber(thread.stack + kStackBytes - rank % 61 * 64, thread_main);
    }
  }
  ready.push_all(count, [](size_t i) { return &threads[i]; });
  return true;
}

bool run_wave() {
  const bool stopped = run_threads();
  running = nullptr;
  if (stopped || exited == threads.size()) return !stopped;
  report_stuck();
  return false;
}

void count_barriers(Barriers* barriers) {
  for (const Block& block : wave) barriers->block = std::max<uint64_t>(barriers->block, block.barriers);
  for (const Cluster& cluster : clusters) barriers->cluster = std::max<uint64_t>(barriers->cluster, cluster.phase);
  barriers->grid = grid_barriers;
}

}  // namespace

std::string name_of_block(unsigned rank) { return name_of(uint3(block_index(rank))); }

std::string name_of_thread(uint32_t id) {
  return "thread " + name_of(thread_index(rank_of(id))) + " of block " + name_of_block(block_of(id));
}

std::string name_of(const Thread& thread) { return name_of_thread(thread.id); }

// Blocks are counted cluster by cluster, and clusters as CUDA counts blocks.
dim3 block_index(unsigned rank) {
  const dim3 size = launching->cluster;
  const unsigned across = launching->grid.x / size.x, down = launching->grid.y / size.y;
  const unsigned cluster = rank / launching->cluster_blocks, inner = rank % launching->cluster_blocks;
  return {cluster % across * size.x + inner % size.x, cluster / across % down * size.y + inner / size.x % size.y,
          cluster / across / down * size.z + inner / size.x / size.y};
}

bool run_grid(const Launching& how, Order order, uint32_t seed, Barriers* barriers) {
  launching = &how;
  blockDim = how.block;
  gridDim = how.grid;
  grid_last = grid_start = ++now;
  grid_barriers = idle_turns = 0;
  bool finished = how.blocks <= kMostBlocks && (!how.cooperative || uint64_t(how.blocks) * how.threads <= kMostThreads);
  if (!finished) {
    report("the engine runs at most " + std::to_string(kMostBlocks) + " blocks, and " + std::to_string(kMostThreads) +
               " threads at once",
           nullptr);
  }
  const unsigned cluster_threads = how.cluster_blocks * how.threads;
  std::vector<unsigned> all(how.blocks / how.cluster_blocks);
  std::iota(all.begin(), all.end(), 0u);
  if (order == Order::kReversed) std::reverse(all.begin(), all.end());
  if (order == Order::kRandom) std::shuffle(all.begin(), all.end(), std::minstd_rand(seed));
  const size_t at_once = how.cooperative ? all.size() : std::max(1u, kThreadsAtOnce / cluster_threads);
  for (size_t begin = 0; begin < all.size() && finished; begin += at_once) {
    std::vector<unsigned> which(all.begin() + begin, all.begin() + std::min(begin + at_once, all.size()));
    std::sort(which.begin(), which.end());  // the order of the threads is the scheduler's
    finished = set_up(which, order, seed) && run_wave();
    count_barriers(barriers);
    wave.clear();
  }
  launching = nullptr;
  return finished;
}

}  // namespace cuda_on_cpu
