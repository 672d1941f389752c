// The parts of hspp.cpp that are compiled once for each instruction set.
#pragma once
#include <cstdint>

namespace wsss {

struct PyramidLevel {
  int window_rows, window_columns, rows, columns;  // pixels of a window, windows of a plane
  int windows() const { return rows * columns; }
};

inline constexpr int kPyramidPadding = 16;  // columns that may be read behind the last

struct PyramidKernels {
  double (*sum)(const float* plane, int height, int width);
  // Sum of the windows' maxima; places[windows] of the first of each, or null. peaks: width + kPyramidPadding values.
  double (*maxima)(const float* plane, int width, const PyramidLevel& level, float* peaks, int32_t* places);
};

}  // namespace wsss
