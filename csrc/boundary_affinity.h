// Affinity between pixels with no boundary between them (Ahn, Cho and Kwak, CVPR 2019, sec. 4.2).
//   out[b,k,y,x] = 1 - max of boundary[b] over the path between (y,x) and (y+dy_k,x+dx_k), both ends included
// 0 where the neighbour is outside the map. Path: the whole points of the box the two span that lie less than a pixel
// off the line between them. NaN counts as larger than any number.
#pragma once
#include <cstdint>

namespace wsss {

struct BoundaryShape {
  int64_t batch, height, width;
};

void boundary_affinity_cpu(const float* boundary,  // [B, H, W] contiguous
                           float* out,             // [B, K, H, W] every element is written
                           BoundaryShape shape, int radius, int threads);

// The gradient of a pair goes to the maximum of its path, of equal ones to that with the largest |dy| + |dx| from
// (y,x), of those to the first row-major. The same bits for any number of threads.
void boundary_affinity_backward_cpu(const float* grad,      // [B, K, H, W]
                                    const float* boundary,  // [B, H, W]
                                    float* grad_boundary,   // [B, H, W] every element is written
                                    BoundaryShape shape, int radius, int threads);

}  // namespace wsss
