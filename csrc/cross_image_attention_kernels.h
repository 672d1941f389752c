// The parts of cross_image_attention.cpp that are compiled once for each instruction set.
// A matrix B [steps, columns] is packed in panels of `panel` columns: [panels, steps, panel], zeros past the last.
#pragma once
#include <cstddef>
#include <cstdint>

namespace wsss {

// C = A B, or C += A B. Row i of C is at c + c_row * (rows_of_c ? rows_of_c[i] : i).
struct Product {
  const float* a;
  ptrdiff_t a_row, a_step;  // one of them is 1
  const float* b;           // panels
  int rows, steps, columns;
  float* c;
  ptrdiff_t c_row;
  const int32_t* rows_of_c;
  bool add;
};

struct ScoreRows {
  float* scores;  // [rows, line]; unscaled on the way in
  ptrdiff_t line;
  int rows, count;
  float scale;
  int top_k;            // 0, or < count
  float log_threshold;  // -infinity: none
  float* stats;
  float* entropy;  // or null
};

struct GradientRows {
  float* scores;   // [rows, line] unscaled scores on the way in, softmax on the way out
  float* weights;  // [rows, line] d loss / d softmax on the way in, d loss / d <query, key> on the way out
  ptrdiff_t line;
  int rows, count;
  float scale;
  const float* stats;
  const float* grad_entropy;  // or null
  bool attended;              // else the entropy alone has a gradient, and weights holds nothing
};

struct AttentionKernels {
  int panel;
  // Rows first ... first + steps of a row-major matrix (chosen by index, if given), columns as they are.
  void (*pack)(const float* from, ptrdiff_t row, const int32_t* index, int steps, int columns, float* to);
  // The transpose: the rows of the matrix become columns.
  void (*pack_rows)(const float* from, ptrdiff_t row, const int32_t* index, int steps, int columns, float* to);
  void (*multiply)(const Product& product);
  void (*attend)(const ScoreRows& rows);  // scores -> softmax over those kept, 0 elsewhere
  void (*differentiate)(const GradientRows& rows);
};

}  // namespace wsss
