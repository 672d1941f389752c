// The parts of hspp.cpp that are compiled once for each instruction set.
#pragma once
#include <cstdint>

namespace wsss {

struct PyramidLevel {
  int window_rows, window_columns, rows, columns;  // pixels of a window, windows of a plane
  int windows() const { return rows * columns; }
};

// The maxima of the windows of as many planes, side by side: [windows][kPyramidPlanes].
inline constexpr int kPyramidPlanes = 16;
struct PyramidMaxima {
  float* values;
  int32_t* places;  // of the first of each in its plane; null: not wanted
  PyramidMaxima operator+(int64_t count) const { return {values + count, places ? places + count : nullptr}; }
};

struct PyramidKernels {
  double (*sum)(const float* plane, int height, int width);
  // One plane's, into the first column of `maxima`. Scratch: (rows of windows) * width + kPyramidPadding of each.
  void (*find)(const float* plane, int width, const PyramidLevel& level, PyramidMaxima scratch, PyramidMaxima maxima);
  // Those of a level from those of one it is made of: every window is made of whole windows.
  void (*merge)(const PyramidLevel& fine, PyramidMaxima found, const PyramidLevel& coarse, PyramidMaxima merged);
  void (*add_means)(const float* values, int windows, double* totals);  // totals[kPyramidPlanes]
};
inline constexpr int kPyramidPadding = 16;  // values that may be read and written behind the last

}  // namespace wsss
