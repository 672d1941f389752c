// The inner loops of k-means, one table per instruction set. Rows are padded with zeros to kPadding values.
#pragma once
#include <cstddef>
#include <cstdint>

namespace wsss {

constexpr int kPadding = 16;    // floats: the widest vector
constexpr int kRowsAtOnce = 8;  // of one call of products
constexpr int kDepth = 256;     // columns taken together: of a few packed vectors they stay in the first-level cache

struct KMeansKernels {
  // sums[d] = x[i][d] over a few rows, `stride` apart, for `count` columns; squares[i] = |x_i|^2.
  void (*block_sums)(const float* x, int64_t rows, int64_t stride, int64_t count, float* sums, double* squares);
  // to = from - mean; -> its square.
  double (*centre_row)(const float* from, const float* mean, float* to, int64_t count);
  // out[i * vectors + j] = rows[i] . vector j, for count <= kRowsAtOnce rows; next: rows to fetch meanwhile. packed:
  // kPadding values of every vector, the next kPadding of every vector, ...; partial: kRowsAtOnce * vectors * kPadding
  // floats.
  void (*products)(const float* const* rows, const float* const* next, int count, const float* packed, int64_t vectors,
                   int64_t depth, float* out, float* partial);
  // Before the values are fetched: a prefetch into a page whose address is not at hand is dropped.
  void (*open_pages)(const float* x, int64_t count);
  // from -= x, to += x, each unless null; next: values to fetch meanwhile.
  void (*move_row)(const float* x, const float* next, int64_t count, double* from, double* to);
  // center = sums / rows; -> the square of its move.
  double (*move_center)(const double* sums, double rows, int64_t count, const float* before, float* center);
  // rows * center^2 - 2 sums . center: with the rows' own squares the sum of their squared distances.
  double (*spread)(const double* sums, double rows, int64_t count, const float* center);
  double (*square)(const float* a, int64_t count);
  double (*square_distance)(const float* a, const float* b, int64_t count);
};

}  // namespace wsss
