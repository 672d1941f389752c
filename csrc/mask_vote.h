// Segments vote: every pixel takes the mean (or the maximum) of the map over its segment; where masks overlap, the mean
// (the maximum) of theirs. A pixel of no segment keeps its value.
//
// Sums are taken over pixels in one order, whatever the number of threads.
#pragma once
#include <cstdint>

namespace wsss {

struct VoteShape {
  int64_t channels, pixels;  // pixels < 2^31
};

template <class Id>                        // int32_t or int64_t, any values; a negative one is no segment
void segment_vote_cpu(const float* maps,   // [C, N] contiguous
                      const Id* segments,  // [N]
                      float* out,          // [C, N] every element is written
                      VoteShape shape, bool maximum, int threads);

void mask_vote_cpu(const float* maps,     // [C, N] contiguous
                   const uint8_t* masks,  // [masks_count, N] 0 or 1
                   float* out,            // [C, N] every element is written
                   VoteShape shape, int64_t masks_count, bool maximum, int threads);

}  // namespace wsss
