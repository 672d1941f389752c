// The parts of hspp.cpp that are compiled once for each instruction set.
#pragma once
#include <cstdint>

namespace wsss {

struct PyramidLevel {
  int window_rows, window_columns, rows, columns;  // pixels of a window, windows of a plane
  int windows() const { return rows * columns; }
};

inline constexpr int kPyramidPadding = 16;  // columns that may be read behind the last

// Of width + kPyramidPadding values each.
struct PyramidScratch {
  float* peaks;
  int32_t* places;
};

struct PyramidKernels {
  double (*sum)(const float* plane, int height, int width);
  // values[windows]: their maxima; places[windows] of the first of each, or null.
  void (*maxima)(const float* plane, int width, const PyramidLevel& level, PyramidScratch scratch, float* values,
                 int32_t* places);
};

}  // namespace wsss
