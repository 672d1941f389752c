// The parts of cross_image_attention.cpp that are compiled once for each instruction set.
// A matrix B [steps, columns] is packed in panels of `panel` columns: [panels, steps, panel], zeros past the last.
// Scores are such a panel: an entry a row, a query a column.
#pragma once
#include <cstddef>
#include <cstdint>

namespace wsss {

// C = A B, or C += A B, or C = A B + start of its row.
struct Product {
  const float* a;
  ptrdiff_t a_row, a_step;  // one of them is 1
  const float* b;           // panels, b_panel floats apart
  ptrdiff_t b_panel;
  int rows, steps, columns;
  float* c;
  ptrdiff_t c_row;
  bool add;
  const float* start;  // or null
};

struct ScoreColumns {
  float* scores;  // [count, panel] unscaled scores on the way in, softmax over those kept on the way out
  int count, columns;
  float scale;
  int top_k;            // 0, or < count
  float log_threshold;  // -infinity: none
  float* stats;
  float* entropy;  // or null
};

struct GradientColumns {
  float* scores;   // [count, panel] softmax on the way out; on the way in that too if it is known, else unscaled scores
  float* weights;  // [count, panel] d loss / d softmax on the way in, d loss / d <query, key> on the way out
  int count, columns;
  float scale;
  const float* stats;
  const float* grad_entropy;  // or null; then the softmax is not known
  bool attended;              // else the entropy alone has a gradient, and weights holds nothing
  bool known;
};

struct AttentionKernels {
  int lanes, panel;
  // B[k, j] = from[(index ? index[k] : k) * row + j]
  void (*pack)(const float* from, ptrdiff_t row, const int32_t* index, int steps, int columns, float* to);
  // B[k, j] = from[(index ? index[j] : j) * row + k], at to[j / panel * to_panel + k * to_row + j % panel]
  void (*pack_rows)(const float* from, ptrdiff_t row, const int32_t* index, int steps, int columns, float* to,
                    ptrdiff_t to_row, ptrdiff_t to_panel);
  // to[index[j] * to_row + i] += from[i * row + j]
  void (*add_transposed)(const float* from, ptrdiff_t row, int rows, int columns, const int32_t* index, float* to,
                         ptrdiff_t to_row);
  void (*multiply)(const Product& product);
  void (*attend)(const ScoreColumns& columns);
  void (*differentiate)(const GradientColumns& columns);
};

}  // namespace wsss
