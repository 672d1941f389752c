// Attention of the queries of an image to a memory shared by the batch (MCIC, Fan and Zhang, TPAMI 2022).
//   s[q, m] = scale * (<query[q], keys[m]> + key_bias[m]) over the entries m that the mask of the image allows,
//   p = softmax of s over those kept: the top_k strongest, of them the ones with softmax >= threshold,
//   out[q] = sum over m of p[q, m] values[m] + out_bias,
//   entropy[q] = -sum over allowed m of a log(a + 1e-5), a = softmax(s)
// Allowed entries are packed side by side once an image: the work follows their number.
#pragma once
#include <cstdint>

namespace wsss {

inline constexpr int kAttentionStats = 5;   // a query: maximum, 1 / sum, lowest score kept, 1 / sum of those, slope
inline constexpr int kAttentionPanel = 64;  // the kept weights' queries are padded to a multiple of it

struct AttentionShape {
  int64_t batch, heads, queries, entries, dim;
  bool shared;        // keys and values [heads, M, d], else [B, heads, M, d]
  bool query_first;   // channels first: query [B, heads, d, S], else [B, heads, S, d]
  bool grad_first;    // the gradient of out
  bool result_first;  // out, and the gradient of query
};

struct AttentionMemory {
  const float* keys;
  const float* values;    // null: no out
  const float* key_bias;  // [M], heads == 1 and shared, or null
  const float* out_bias;  // [d], result_first, or null
  const uint8_t* mask;    // [B, M], 0 forbids; null: all allowed
};

struct AttentionOptions {
  float scale;       // > 0
  int64_t top_k;     // 0: all
  double threshold;  // < 0: none
};

// The slope of a query's entropy is sum over m of a d entropy / d a, kept for the gradient.
// Workspace: the allowed entries of an image twice, and for each thread a panel of queries and one of scores.
void cross_image_attention_cpu(const float* query, const AttentionMemory& memory,
                               float* out,      // every element is written; null where values is
                               float* entropy,  // [B, heads, S], or null
                               float* stats,    // [B, heads, S, kAttentionStats]
                               float* weights,  // [B, heads, M, S padded]: p for the gradient, in an order of the
                                                // kernel's own, if an image allows no more than d entries; null: not
                               AttentionShape shape, const AttentionOptions& options, int threads);

struct AttentionGradients {  // null: not wanted
  float* query;
  float* keys;      // the shape of keys, must hold zeros
  float* values;    // null where keys is; the shape of keys, must hold zeros
  float* key_bias;  // [M], must hold zeros
};

// Scores that were not kept are computed again.
// Every sum over queries and images is taken in their order, by one thread.
void cross_image_attention_backward_cpu(const float* grad,          // of out, null where values is
                                        const float* grad_entropy,  // null: none
                                        const float* query, const AttentionMemory& memory, const float* stats,
                                        const float* weights, const AttentionGradients& gradients, AttentionShape shape,
                                        float scale, int threads);

}  // namespace wsss
