#include "affinity_loss.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "affinity_loss_kernels.h"
#include "common/buffer.h"
#include "common/isa.h"
#include "common/parallel.h"

namespace wsss {

WSSS_FOR_EACH_ISA(extern const LossKernels loss_kernels;)

namespace {

const LossKernels& kernels() { return WSSS_CHOOSE_ISA(loss_kernels); }

constexpr double kEpsilon = 1e-5;
constexpr double kShare[kPairClasses] = {0.25, 0.25, 0.5};
constexpr double kPairsPerThread = 1e5;  // some tens of microseconds

template <class Label>
void encode(const Label* labels, int64_t ignore, int64_t width, int32_t* codes) {
  for (int64_t x = 0; x < width; ++x) {
    const int64_t label = labels[x];
    const bool none = label < 0 || label == ignore || label > std::numeric_limits<int32_t>::max();
    codes[x] = none ? -1 : int32_t(label);
  }
}

// The labels of a batch as codes with margins of -1: [B][H + radius - 1][line], and the sources [B][H][line].
class LabelCodes {
 public:
  LabelCodes(const LossLabels& labels, LossShape shape, const Neighbourhood& hood, bool cropped)
      : labels_(labels),
        shape_(shape),
        hood_(hood),
        cropped_(cropped),
        line_(code_line(shape.width)),
        image_(line_ * size_t(shape.height + hood.radius - 1)),
        codes_(image_ * shape.batch),
        sources_(line_ * shape.height * shape.batch) {}

  void write_row(int64_t row) const {
    const int64_t b = row / shape_.height, y = row % shape_.height, margin = hood_.radius - 1;
    int32_t* const codes = codes_.get() + b * image_ + y * line_;
    std::fill_n(codes, line_, -1);
    const int64_t at = row * shape_.width;
    int32_t* const inner = codes + kCodeMargin;
    switch (labels_.bytes) {
      case 1: encode(static_cast<const uint8_t*>(labels_.data) + at, labels_.ignore, shape_.width, inner); break;
      case 4: encode(static_cast<const int32_t*>(labels_.data) + at, labels_.ignore, shape_.width, inner); break;
      default: encode(static_cast<const int64_t*>(labels_.data) + at, labels_.ignore, shape_.width, inner);
    }
    if (y == shape_.height - 1) std::fill_n(codes + line_, line_ * margin, -1);
    int32_t* const sources = sources_.get() + row * line_;
    std::copy_n(codes, line_, sources);
    if (!cropped_) return;
    if (y >= shape_.height - margin || shape_.width <= 2 * margin) {
      std::fill_n(sources, line_, -1);
    } else {
      std::fill_n(sources, kCodeMargin + margin, -1);
      std::fill_n(sources + kCodeMargin + shape_.width - margin, margin, -1);
    }
  }

  LossRow row(int64_t row, const float* affinity) const {
    const int64_t b = row / shape_.height, y = row % shape_.height;
    return {&hood_,
            int(shape_.width),
            size_t(shape_.height * shape_.width),
            affinity + offset(row),
            sources_.get() + row * line_ + kCodeMargin,
            codes_.get() + b * image_ + y * line_ + kCodeMargin};
  }
  // Of a row's neighbour 0 in a [B, K, H, W].
  size_t offset(int64_t row) const {
    const int64_t b = row / shape_.height, y = row % shape_.height;
    return size_t((b * hood_.count * shape_.height + y) * shape_.width);
  }

 private:
  const LossLabels& labels_;
  const LossShape shape_;
  const Neighbourhood& hood_;
  const bool cropped_;
  const size_t line_, image_;
  const Buffer<int32_t> codes_, sources_;
};

int team_size(LossShape shape, const Neighbourhood& hood, int threads) {
  const double pairs = double(shape.batch) * double(shape.height) * double(shape.width) * hood.count;
  return worthwhile_threads(usable_threads(threads), pairs, kPairsPerThread);
}

}  // namespace

void affinity_loss_cpu(const float* affinity, const LossLabels& labels, double* loss, double* counts, LossShape shape,
                       int radius, bool cropped, int threads) {
  const Neighbourhood hood = make_neighbourhood(radius);
  const int64_t rows = shape.width > 0 ? shape.batch * shape.height : 0;
  const LabelCodes codes(labels, shape, hood, cropped);
  std::vector<double> row_sums(rows * kPairClasses), row_counts(rows * kPairClasses);
  if (rows > 0 && hood.count > 0) {
    parallel(team_size(shape, hood, threads), [&](const Team& team) {
      for (int64_t row = team.begin(rows); row < team.end(rows); ++row) codes.write_row(row);
      team.barrier();
      for (int64_t row = team.begin(rows); row < team.end(rows); ++row) {
        kernels().sums(codes.row(row, affinity), &row_sums[row * kPairClasses], &row_counts[row * kPairClasses]);
      }
    });
  }
  *loss = 0;
  for (int c = 0; c < kPairClasses; ++c) {  // in one order, whatever the number of threads
    double sum = counts[c] = 0;
    for (int64_t row = 0; row < rows; ++row) {
      sum += row_sums[row * kPairClasses + c];
      counts[c] += row_counts[row * kPairClasses + c];
    }
    *loss += kShare[c] * sum / (counts[c] + kEpsilon);
  }
}

void affinity_loss_backward_cpu(double grad, const float* affinity, const LossLabels& labels, const double* counts,
                                float* grad_affinity, LossShape shape, int radius, bool cropped, int threads) {
  const Neighbourhood hood = make_neighbourhood(radius);
  const int64_t rows = shape.width > 0 ? shape.batch * shape.height : 0;
  if (rows == 0 || hood.count == 0) return;
  const LabelCodes codes(labels, shape, hood, cropped);
  float weights[kPairClasses];
  for (int c = 0; c < kPairClasses; ++c) weights[c] = float(grad * kShare[c] / (counts[c] + kEpsilon));
  expect_writes(grad_affinity, size_t(rows) * hood.count * shape.width * sizeof(float));
  parallel(team_size(shape, hood, threads), [&](const Team& team) {
    for (int64_t row = team.begin(rows); row < team.end(rows); ++row) codes.write_row(row);
    team.barrier();
    for (int64_t row = team.begin(rows); row < team.end(rows); ++row) {
      kernels().gradient(codes.row(row, affinity), weights, grad_affinity + codes.offset(row));
    }
  });
}

}  // namespace wsss
