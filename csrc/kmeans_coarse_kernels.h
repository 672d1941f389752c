// The inner loops over rows as bytes, one table per instruction set.
#pragma once
#include <cstdint>

namespace wsss {

constexpr int kBytePadding = 64;  // the widest vector

struct KMeansCoarseKernels {
  bool (*available)();  // whether this processor has the other three
  // A row as bytes, from[d] = low + step * bytes[d] + rest[d], zeros up to kBytePadding; -> |rest|^2.
  float (*to_bytes)(const float* from, int64_t count, uint8_t* bytes, float* low, float* step);
  // to - from as whole numbers in -127..127 times a step, into packed as vector j; -> step. sum: of the whole numbers;
  // length, rest: |to - from|^2, and of what rounding leaves. packed: as byte_products reads it.
  float (*round_move)(const float* to, const float* from, int64_t count, int64_t j, int64_t vectors, int8_t* packed,
                      float* sum, float* length, float* rest);
  // out[i * vectors + j] = rows[i] . vector j, for count <= kRowsAtOnce rows.
  void (*byte_products)(const uint8_t* const* rows, const uint8_t* const* next, int count, const int8_t* packed,
                        int64_t vectors, int64_t depth, int32_t* out);
};

}  // namespace wsss
