// Lloyd's iterations on one problem; every thread of a team calls the same methods, which meet at the team's barriers.
#pragma once
#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "common/buffer.h"
#include "common/parallel.h"
#include "kmeans.h"
#include "kmeans_coarse.h"
#include "kmeans_kernels.h"

namespace wsss {
namespace kmeans {

const KMeansKernels& kernels();

// Of a product in float32, of the two squares' sum.
inline constexpr float kRounding = 3e-6f;

class Solver {
 public:
  Solver(const KMeansProblem& problem, double tol, int threads);
  bool finite() const { return finite_; }
  // The rows to work on: x itself, or a copy relative to the mean where rounding by a large offset would show, or where
  // rows need padding.
  void prepare(const Team& team);
  void run(const Team& team, int64_t run, int64_t iterations);

 private:
  const float* row(int64_t i) const { return rows_ + i * depth_; }
  float* center(int64_t j) const { return centers_.get() + j * depth_; }

  // For the products: kPadding values of every vector, the next kPadding of every vector, ...
  void pack(const Team& team, const float* const* others, int64_t vectors);

  // body(row number, its products with the packed vectors).
  template <class Body>
  void for_products(const Team& team, const std::vector<int64_t>& numbers, int64_t vectors, Body&& body) {
    float* const partial = work_.get() + work_size_ * team.thread;
    float* const out = partial + size_t(kRowsAtOnce) * vectors * kPadding;
    const int64_t count = int64_t(numbers.size());
    const float* rows[2 * kRowsAtOnce];  // the second half is fetched while the first is worked on
    for (int64_t first = 0; first < count; first += kRowsAtOnce) {
      for (int64_t r = 0; r < 2 * kRowsAtOnce; ++r) rows[r] = row(numbers[std::min(first + r, count - 1)]);
      const int taken = int(std::min<int64_t>(kRowsAtOnce, count - first));
      kernels().products(rows, rows + kRowsAtOnce, taken, packed_.get(), vectors, depth_, out, partial);
      for (int r = 0; r < taken; ++r) body(numbers[first + r], out + r * vectors);
    }
  }
  // Rows of the thread's share that wanted(row).
  template <class Wanted>
  std::vector<int64_t> of_share(const Team& team, Wanted&& wanted) const {
    std::vector<int64_t> numbers;
    for (int64_t i = team.begin(p_.rows); i < team.end(p_.rows); ++i) {
      if (wanted(i)) numbers.push_back(i);
    }
    return numbers;
  }

  // Greedy k-means++: of a few candidates drawn by their squared distance, the one that leaves the least.
  void seed(const Team& team, const double* draws);
  void draw(const double* draws);
  void choose();

  // labels_ of the centers; upper_ and lower_ bound the distance to the own center and to each group of others.
  void assign(const Team& team);
  // Takes the moves of the centers off the bounds; -> whether the label may be another now.
  bool may_change(int64_t i);
  // product: with the centers, error(j): of the square distance from center j; -> whether the label is certain.
  template <class Error>
  bool set_bounds(int64_t i, const float* product, Error&& error);
  // Sums and numbers of rows of the centers after labels_; changed_ lists the rows that moved.
  void account(const Team& team);
  // Centers to the means of their rows; -> whether no label changed. shift_: the sum of the squared moves.
  bool move(const Team& team);
  // As scikit-learn: each center without rows takes the row farthest from its own center away from that center.
  void fill_empty();

  const KMeansProblem& p_;
  const double tol_;
  const int64_t depth_, chunks_, groups_, trials_;
  const int64_t blocks_;
  const Buffer<float> block_sums_;          // [blocks, D]
  std::unique_ptr<Buffer<float>> copy_;     // [N, depth]
  const float* rows_ = nullptr;             // [N, depth]
  Buffer<float> centers_, moved_, packed_;  // [k, depth]
  const Buffer<double> sums_;               // [k, depth] of the rows by last_
  const Buffer<float> mean_;                // [depth]
  std::vector<float> norms_;                // squares
  std::vector<double> row_values_;          // [N] whatever is to be added up in the order of the rows
  std::vector<float> upper_, lower_;        // [N], [N, groups]
  std::vector<int64_t> labels_, last_;      // now, and when the centers were last moved
  std::vector<int64_t> near_;               // [N] while seeding: the nearest center so far
  std::vector<float> candidate_distances_;  // [N, trials]
  std::vector<int64_t> counts_;
  std::vector<float> center_norms_, moves_;
  std::vector<double> chunk_moves_;  // [k, chunks]
  std::vector<float> group_moves_;
  const size_t work_size_;
  const Buffer<float> work_;
  std::unique_ptr<CoarseRows> coarse_;  // null: of no use for these rows
  std::atomic<int64_t> reread_{0};      // rows whose products were taken since the base of coarse_
  float base_largest_ = 0;              // of the centers' squares then
  std::vector<int64_t> chosen_, candidates_, changed_;
  int64_t best_ = 0, empty_ = 0;
  double enough_ = 0, shift_ = 0, squares_ = 0;
  bool finite_ = false, relative_ = false, bounded_ = false, assigned_ = false, better_ = false;
};

}  // namespace kmeans
}  // namespace wsss
