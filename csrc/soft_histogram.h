// Soft histogram of pixels over a codebook (Ru et al., IJCAI 2021).
//   s[m,p] = cos(c_m, f_p), 0 where either is zero;  P[m,p] = softmax over m of temperature * s
//   histogram[m] = sum over pixels of P[m,p];  assignment[p] = the m of the largest s, the lowest among equals
//
// Nothing of pixels x words is stored: a tile of pixels meets all words while it is in the cache, and backward does the
// products again. Results do not depend on the number of threads.
#pragma once
#include <cstdint>

namespace wsss {

struct HistogramShape {
  int64_t batch, dim, pixels, words;
};

void soft_histogram_cpu(const float* feats,     // [B, D, N] contiguous
                        const float* codebook,  // [M, D]
                        float* histogram,       // [B, M] every element of what follows is written
                        uint8_t* words,         // [B, M] 0 or 1: some pixel's assignment
                        int64_t* assignment,    // [B, N]
                        float* inverse_norm,    // [B, N] 1 / |f|, 0 for a zero vector
                        float* log_sum,         // [B, N] log of the softmax's denominator
                        HistogramShape shape, float temperature, int threads);

void soft_histogram_backward_cpu(const float* grad,  // [B, M] of the histogram
                                 const float* feats, const float* codebook,
                                 const float* inverse_norm,  // of the forward
                                 const float* log_sum,
                                 float* grad_feats,     // [B, D, N] or null: not wanted
                                 float* grad_codebook,  // [M, D] or null
                                 HistogramShape shape, float temperature, int threads);

}  // namespace wsss
