#include "kmeans_coarse.h"

#include <cmath>

#include "common/isa.h"

namespace wsss {

WSSS_FOR_EACH_ISA(extern const KMeansCoarseKernels kmeans_coarse_kernels;)

namespace kmeans {

const KMeansCoarseKernels& coarse_kernels() { return WSSS_CHOOSE_ISA(kmeans_coarse_kernels); }

namespace {

constexpr float kUp = 1 + 1e-3f;         // norms and errors, rounded up
constexpr float kFloatRounding = 1e-6f;  // of a row's norm: what taking bytes apart in float32 adds to what is left

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
    move.length = std::sqrt(length) * kUp;
    move.rest = std::sqrt(rest) * kUp;
  }
  team.barrier();
}

void CoarseRows::keep(int64_t i, const float* row, const float* products) {
  Row& kept = rows_[i];
  if (kept.base == 0) {
    const float rest = coarse_kernels().to_bytes(row, depth_, bytes_.get() + i * stride_, &kept.low, &kept.step);
    kept.rest = std::sqrt(rest) * kUp;
  }
  kept.base = base_number_;
  std::copy_n(products, clusters_, base_products_.get() + i * clusters_);
}

void CoarseRows::bound(int64_t i, float norm, const int32_t* sums, float* products, float* errors) const {
  const Row& row = rows_[i];
  const float length = std::sqrt(norm), rest = row.rest + kFloatRounding * length;
  const float* const base = base_products_.get() + i * clusters_;
  for (int64_t j = 0; j < clusters_; ++j) {
    const Move& move = moves_[j];
    products[j] = base[j] + move.step * (row.low * move.sum + row.step * float(sums[j]));
    errors[j] = (rest * move.length + (length + rest) * move.rest) * kUp;
  }
}

}  // namespace kmeans
}  // namespace wsss
