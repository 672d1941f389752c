// Maps of many small images, each walked over the affinity of its own features (local_affinity, then random_walk): an
// image a thread, where one image after the other would have all threads meet after every step.
#pragma once
#include <vector>

#include "local_affinity.h"
#include "random_walk.h"

namespace wsss {

struct FeatureWalk {
  const float* feats;  // [B, D, H, W]
  const float* maps;   // [B, C, H, W]
  float* out;          // [B, C, H, W]
  FeatureShape shape;
  int64_t channels;  // C
  int64_t steps;
};

// options.steps is not looked at. The results are those of the two functions called in turn.
void feature_walks_cpu(const std::vector<FeatureWalk>& walks, const AffinityOptions& affinity,
                       const WalkOptions& options, int threads);

}  // namespace wsss
