// Boxes round the strong regions of a map (Lin et al., CVPR 2023, sec. 3.3).
//   out = 1 inside the smallest box round any 8-connected region of map > threshold * peak, else 0
// peak is the largest finite value of the map; where it is not positive there is no region. NaN belongs to none.
#pragma once
#include <cstdint>

namespace wsss {

void region_boxes_cpu(const float* maps,  // [M, H, W] contiguous, 2 H W < 2^31
                      uint8_t* out,       // [M, H, W] 0 or 1, every element is written
                      int64_t maps_count, int64_t height, int64_t width, float threshold, int threads);

}  // namespace wsss
