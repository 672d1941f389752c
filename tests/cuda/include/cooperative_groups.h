// Stands in for CUDA's header: blocks, clusters, grids and tiles of a warp.
#pragma once
#include "cuda_runtime.h"

namespace cuda_on_cpu {

enum class Scope { kBlock, kCluster, kGrid };

struct Extent {
  dim3 blocks, index;  // of the scope; of the own block in it
  unsigned rank, count;
};

Extent extent(Scope scope);
void grid_barrier();
bool grid_is_cooperative();
void cluster_arrive();
void cluster_wait();
void* in_block_of_cluster(void* own_shared, unsigned rank);
unsigned rank_of_owner(const void* shared);
unsigned thread_rank();
unsigned block_threads();

}  // namespace cuda_on_cpu

namespace cooperative_groups {

class thread_block {
 public:
  static __forceinline__ void sync() { __syncthreads(); }
  static unsigned thread_rank() { return cuda_on_cpu::thread_rank(); }
  static unsigned num_threads() { return cuda_on_cpu::block_threads(); }
  static unsigned size() { return num_threads(); }
  static dim3 group_index() { return dim3(blockIdx); }
  static dim3 thread_index() { return dim3(threadIdx); }
  static dim3 dim_threads() { return blockDim; }
  static dim3 group_dim() { return blockDim; }
};
inline thread_block this_thread_block() { return {}; }

class grid_group {
 public:
  static bool is_valid() { return cuda_on_cpu::grid_is_cooperative(); }
  static __forceinline__ void sync() { cuda_on_cpu::grid_barrier(); }
  static unsigned long long block_rank() { return cuda_on_cpu::extent(cuda_on_cpu::Scope::kGrid).rank; }
  static unsigned long long num_blocks() { return cuda_on_cpu::extent(cuda_on_cpu::Scope::kGrid).count; }
  static unsigned long long thread_rank() {
    return block_rank() * cuda_on_cpu::block_threads() + cuda_on_cpu::thread_rank();
  }
  static unsigned long long num_threads() { return num_blocks() * cuda_on_cpu::block_threads(); }
  static unsigned long long size() { return num_threads(); }
  static dim3 block_index() { return dim3(blockIdx); }
  static dim3 dim_blocks() { return gridDim; }
  static dim3 group_dim() { return gridDim; }
};
inline grid_group this_grid() { return {}; }

#if __CUDA_ARCH__ >= 900
class cluster_group {
 public:
  struct arrival_token {};
  static __forceinline__ void sync() {
    cuda_on_cpu::cluster_arrive();
    cuda_on_cpu::cluster_wait();
  }
  static __forceinline__ arrival_token barrier_arrive() {
    cuda_on_cpu::cluster_arrive();
    return {};
  }
  static __forceinline__ void barrier_wait() { cuda_on_cpu::cluster_wait(); }
  static __forceinline__ void barrier_wait(arrival_token&&) { cuda_on_cpu::cluster_wait(); }
  template <class T>
  static __forceinline__ T* map_shared_rank(T* own, int rank) {
    return static_cast<T*>(cuda_on_cpu::in_block_of_cluster(const_cast<std::remove_const_t<T>*>(own), unsigned(rank)));
  }
  static unsigned query_shared_rank(const void* shared) { return cuda_on_cpu::rank_of_owner(shared); }
  static unsigned block_rank() { return cuda_on_cpu::extent(cuda_on_cpu::Scope::kCluster).rank; }
  static unsigned num_blocks() { return cuda_on_cpu::extent(cuda_on_cpu::Scope::kCluster).count; }
  static dim3 block_index() { return cuda_on_cpu::extent(cuda_on_cpu::Scope::kCluster).index; }
  static dim3 dim_blocks() { return cuda_on_cpu::extent(cuda_on_cpu::Scope::kCluster).blocks; }
  static unsigned thread_rank() { return block_rank() * cuda_on_cpu::block_threads() + cuda_on_cpu::thread_rank(); }
  static unsigned num_threads() { return num_blocks() * cuda_on_cpu::block_threads(); }
  static unsigned size() { return num_threads(); }
};
inline cluster_group this_cluster() { return {}; }
#endif

// Of at most a warp: kThreads lanes side by side.
template <unsigned kThreads>
class thread_block_tile {
  static_assert(kThreads >= 1 && kThreads <= 32 && (kThreads & (kThreads - 1)) == 0, "tiles are powers of 2 up to 32");

 public:
  static __forceinline__ void sync() { __syncwarp(mask()); }
  static unsigned thread_rank() { return unsigned(cuda_on_cpu::lane()) % kThreads; }
  static constexpr unsigned num_threads() { return kThreads; }
  static constexpr unsigned size() { return kThreads; }
  static unsigned meta_group_rank() { return cuda_on_cpu::thread_rank() / kThreads; }
  static unsigned meta_group_size() { return (cuda_on_cpu::block_threads() + kThreads - 1) / kThreads; }
  template <class T>
  static __forceinline__ T shfl(T value, int from) {
    return __shfl_sync(mask(), value, from, kThreads);
  }
  template <class T>
  static __forceinline__ T shfl_up(T value, unsigned delta) {
    return __shfl_up_sync(mask(), value, delta, kThreads);
  }
  template <class T>
  static __forceinline__ T shfl_down(T value, unsigned delta) {
    return __shfl_down_sync(mask(), value, delta, kThreads);
  }
  template <class T>
  static __forceinline__ T shfl_xor(T value, unsigned lanes) {
    return __shfl_xor_sync(mask(), value, int(lanes), kThreads);
  }
  static __forceinline__ int any(int predicate) { return __any_sync(mask(), predicate); }
  static __forceinline__ int all(int predicate) { return __all_sync(mask(), predicate); }
  static __forceinline__ unsigned ballot(int predicate) { return __ballot_sync(mask(), predicate) >> first(); }

 private:
  static unsigned first() { return unsigned(cuda_on_cpu::lane()) / kThreads * kThreads; }
  static unsigned mask() { return (kThreads == 32 ? ~0u : (1u << kThreads % 32) - 1) << first(); }
};
template <unsigned kThreads>
thread_block_tile<kThreads> tiled_partition(thread_block) {
  return {};
}

template <class Group>
__forceinline__ void sync(Group group) {
  group.sync();
}

}  // namespace cooperative_groups
