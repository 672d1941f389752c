#include "feature_walk.h"

#include <atomic>
#include <exception>

#include "common/buffer.h"
#include "common/neighbourhood.h"
#include "common/parallel.h"

namespace wsss {

namespace {

void walk_one(const FeatureWalk& walk, const AffinityOptions& affinity, WalkOptions options) {
  const FeatureShape& shape = walk.shape;
  const size_t links = size_t(neighbour_count(options.radius)) * shape.height * shape.width;
  const Buffer<float> weights(links * shape.batch), scales(shape.batch);
  options.steps = walk.steps;
  local_affinity_cpu(walk.feats, weights.get(), scales.get(), shape, affinity, 1);
  random_walk_cpu(walk.maps, weights.get(), walk.out, WalkShape{shape.batch, walk.channels, shape.height, shape.width},
                  options, 1);
}

}  // namespace

void feature_walks_cpu(const std::vector<FeatureWalk>& walks, const AffinityOptions& affinity,
                       const WalkOptions& options, int threads) {
  std::atomic<size_t> next{0};
  std::exception_ptr error;
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  parallel(usable_threads(std::min<int>(threads, int(walks.size()))), [&](const Team&) {
    try {
      for (size_t i = next++; i < walks.size(); i = next++) walk_one(walks[i], affinity, options);
    } catch (...) {  // no memory; nothing may leave the threads' region
      if (!failed.test_and_set()) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace wsss
