// Rows as bytes: a quarter of the memory and of the instructions, for bounds that mostly tell a row's label.
#pragma once
#include <algorithm>
#include <vector>

#include "common/buffer.h"
#include "common/parallel.h"
#include "kmeans_coarse_kernels.h"
#include "kmeans_kernels.h"

namespace wsss {
namespace kmeans {

const KMeansCoarseKernels& coarse_kernels();

inline constexpr int64_t kMostCoarse = 16;  // centers: up to as many each row has a bound for each of them

// A row is x = low + step * bytes + rest, a center c = base + move; x . base is known from a pass over the rows. Then
// x . c is x . base + (low + step * bytes) . rounded move, within |rest| |move| + (|x| + |rest|) |move - rounded move|.
class CoarseRows {
 public:
  static bool usable(int64_t clusters, int64_t depth) {
    return coarse_kernels().available() && clusters <= kMostCoarse && depth >= kLeastDepth &&
           depth <= kMostDepth - kBytePadding;
  }
  CoarseRows(int64_t rows, int64_t clusters, int64_t depth);

  // The centers whose products are given to `keep` next. These two by every thread of a team; they end in a barrier.
  void rebase(const Team& team, const float* centers);
  void follow(const Team& team, const float* centers);

  void keep(int64_t i, const float* row, const float* products);
  bool kept(int64_t i) const { return rows_[i].base == base_number_; }

  // body(row number, products with the centers, their errors) of these rows, all of them kept; norms: their squares.
  template <class Body>
  void for_bounds(const std::vector<int64_t>& numbers, const float* norms, Body&& body) const {
    const uint8_t* bytes[2 * kRowsAtOnce];  // the second half is fetched while the first is worked on
    int32_t sums[kRowsAtOnce * kMostCoarse];
    float products[kMostCoarse], errors[kMostCoarse];
    const int64_t count = int64_t(numbers.size());
    for (int64_t first = 0; first < count; first += kRowsAtOnce) {
      const int taken = int(std::min<int64_t>(kRowsAtOnce, count - first));
      for (int64_t r = 0; r < 2 * kRowsAtOnce; ++r) {
        bytes[r] = bytes_.get() + numbers[std::min(first + r, count - 1)] * stride_;
      }
      coarse_kernels().byte_products(bytes, bytes + kRowsAtOnce, taken, packed_.get(), clusters_, stride_, sums);
      for (int r = 0; r < taken; ++r) {
        const int64_t i = numbers[first + r];
        bound(i, norms[i], sums + r * clusters_, products, errors);
        body(i, products, errors);
      }
    }
  }

 private:
  struct Row {
    float low, step, rest;
    int32_t base = 0;  // number of the one its products are with; 0: not yet bytes
  };
  struct Move {
    float step, sum, length, rest;
  };

  static constexpr int64_t kLeastDepth = 256;                     // below, the rest of the work on a row is what counts
  static constexpr int64_t kMostDepth = INT32_MAX / (255 * 127);  // sums stay within 32 bits
  void bound(int64_t i, float norm, const int32_t* sums, float* products, float* errors) const;

  const int64_t clusters_, depth_, stride_;
  const Buffer<uint8_t> bytes_;        // [N, stride]
  const Buffer<float> base_products_;  // [N, k]
  const Buffer<float> base_;           // [k, depth]
  const Buffer<int8_t> packed_;        // [k, stride], as `byte_products` takes them
  std::vector<Row> rows_;
  std::vector<Move> moves_;
  int32_t base_number_ = 0;
};

}  // namespace kmeans
}  // namespace wsss
