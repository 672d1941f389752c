#include "kmeans_coarse.h"

#include <cfloat>
#include <cmath>
#include <limits>

#include "common/isa.h"

namespace wsss {

WSSS_FOR_EACH_ISA(extern const KMeansCoarseKernels kmeans_coarse_kernels;)

namespace kmeans {

const KMeansCoarseKernels& coarse_kernels() { return WSSS_CHOOSE_ISA(kmeans_coarse_kernels); }

namespace {

constexpr float kUp = 1 + 1e-3f;         // norms and errors, rounded up
constexpr float kFloatRounding = 4e-7f;  // of the largest number in a sum of a few in float32

// The norm of `values` numbers from the sum of their squares, each of which may have been flushed to zero.
float norm_of(float squares, int64_t values) { return std::sqrt(squares + float(values) * FLT_MIN) * kUp; }

}  // namespace

CoarseRows::CoarseRows(int64_t rows, int64_t clusters, int64_t depth)
    : clusters_(clusters),
      depth_(depth),
      stride_((depth + kBytePadding - 1) / kBytePadding * kBytePadding),
      bytes_(rows * stride_),
      base_products_(rows * clusters),
      base_(clusters * depth),
      packed_(clusters * stride_),
      rows_(rows),
      moves_(clusters) {}

void CoarseRows::rebase(const Team& team, const float* centers) {
  const int64_t values = clusters_ * depth_, begin = team.begin(values);
  std::copy_n(centers + begin, team.end(values) - begin, base_.get() + begin);
  if (team.thread == 0) ++base_number_;
  team.barrier();
}

void CoarseRows::follow(const Team& team, const float* centers) {
  for (int64_t j = team.begin(clusters_); j < team.end(clusters_); ++j) {
    Move& move = moves_[j];
    float length, rest;
    move.step = coarse_kernels().round_move(centers + j * depth_, base_.get() + j * depth_, depth_, j, clusters_,
                                            packed_.get(), &move.sum, &length, &rest);
    move.length = norm_of(length, depth_);
    move.rest = norm_of(rest, depth_);
  }
  team.barrier();
}

void CoarseRows::keep(int64_t i, const float* row, const float* products) {
  Row& kept = rows_[i];
  if (kept.base == 0) {
    const float rest = coarse_kernels().to_bytes(row, depth_, bytes_.get() + i * stride_, &kept.low, &kept.step);
    // low and the bytes' part may be far larger than what they add up to.
    const float largest = std::max(std::abs(kept.low), std::abs(kept.low + 255 * kept.step));
    kept.rest = norm_of(rest, depth_) + kFloatRounding * std::sqrt(float(depth_)) * largest;
  }
  kept.base = base_number_;
  std::copy_n(products, clusters_, base_products_.get() + i * clusters_);
}

void CoarseRows::bound(int64_t i, float norm, const int32_t* sums, float* products, float* errors) const {
  const Row& row = rows_[i];
  const float length = std::sqrt(norm);
  const float* const base = base_products_.get() + i * clusters_;
  float all = 0;
  for (int64_t j = 0; j < clusters_; ++j) {
    const Move& move = moves_[j];
    products[j] = base[j] + move.step * (row.low * move.sum + row.step * float(sums[j]));
    errors[j] = (row.rest * move.length + (length + row.rest) * move.rest) * kUp;
    all += products[j] + errors[j];
  }
  if (!std::isfinite(all)) std::fill_n(errors, clusters_, std::numeric_limits<float>::infinity());
}

}  // namespace kmeans
}  // namespace wsss
