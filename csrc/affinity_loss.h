// AffinityNet's loss on the affinities of a half-disc of neighbours (Ahn and Kwak, CVPR 2018, sec. 3.2).
//   pairs of like labels, 0 (bg) or not (fg), cost -log(a + 1e-5); of unlike ones (neg) -log(1 - a + 1e-5)
//   loss = bg / 4 + fg / 4 + neg / 2, each a sum over the batch divided by its number of pairs + 1e-5
// A pair with a pixel outside the map, with an ignored label or, cropped, with a source in the last radius - 1 rows or
// the first or last radius - 1 columns does not exist.
#pragma once
#include <cstdint>

namespace wsss {

struct LossShape {
  int64_t batch, height, width;
};

struct LossLabels {
  const void* data;  // [B, H, W]
  int bytes;         // a label: 1 (unsigned), 4 or 8 (signed)
  int64_t ignore;    // as are negative labels and those of 2^31 and more
};

constexpr int kPairClasses = 3;  // bg, fg, neg

// Affinities count as the nearer end beyond 0..1, their gradient there is 0.
void affinity_loss_cpu(const float* affinity,  // [B, K, H, W]
                       const LossLabels& labels,
                       double* loss,    // one number
                       double* counts,  // [3] pairs of each class
                       LossShape shape, int radius, bool cropped, int threads);

void affinity_loss_backward_cpu(double grad,            // of the loss
                                const float* affinity,  // [B, K, H, W]
                                const LossLabels& labels,
                                const double* counts,  // [3] as returned, of the whole batch
                                float* grad_affinity,  // [B, K, H, W] every element is written
                                LossShape shape, int radius, bool cropped, int threads);

}  // namespace wsss
