// Attention of the queries of an image to a memory shared by the batch (MCIC, Fan and Zhang, TPAMI 2022).
//   s[q, m] = scale * <query[q], keys[m]> over the entries m that the mask of the image allows,
//   p = softmax of s over those kept: the top_k strongest, of them the ones with softmax >= threshold,
//   out[q] = sum over m of p[q, m] values[m],  entropy[q] = -sum over allowed m of a log(a + 1e-5), a = softmax(s)
// Allowed entries are packed side by side once an image: the work follows their number.
#pragma once
#include <cstdint>

namespace wsss {

inline constexpr int kAttentionStats = 5;  // a query: maximum, 1 / sum, lowest score kept, 1 / sum of those, slope

struct AttentionShape {
  int64_t batch, heads, queries, entries, dim;
  bool shared;  // keys and values [heads, M, d], else [B, heads, M, d]
};

struct AttentionOptions {
  float scale;       // > 0
  int64_t top_k;     // 0: all
  double threshold;  // < 0: none
};

// The slope of a query's entropy is sum over m of a d entropy / d a, kept for the gradient.
// Workspace: the allowed entries of an image twice, and 72 rows of scores for each thread.
void cross_image_attention_cpu(const float* query,   // [B, heads, S, d]
                               const float* keys,    //
                               const float* values,  // null: no out
                               const uint8_t* mask,  // [B, M], 0 forbids; null: all allowed
                               float* out,           // [B, heads, S, d] every element is written
                               float* entropy,       // [B, heads, S], or null
                               float* stats,         // [B, heads, S, kAttentionStats]
                               AttentionShape shape, const AttentionOptions& options, int threads);

// Scores are computed again. grad_query may be null, grad_keys and grad_values together too: not wanted.
// grad_keys and grad_values have the shape of keys and must hold zeros.
// Every sum over queries and images is taken in their order, by one thread.
void cross_image_attention_backward_cpu(const float* grad,          // of out, null where values is
                                        const float* grad_entropy,  // null: none
                                        const float* query, const float* keys, const float* values, const uint8_t* mask,
                                        const float* stats, float* grad_query, float* grad_keys, float* grad_values,
                                        AttentionShape shape, float scale, int threads);

}  // namespace wsss
