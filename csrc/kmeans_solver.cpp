#include "kmeans_solver.h"

#include <cmath>
#include <limits>
#include <utility>

#include "common/isa.h"

namespace wsss {

WSSS_FOR_EACH_ISA(extern const KMeansKernels kmeans_kernels;)

namespace kmeans {

namespace {

constexpr int64_t kColumns = 256;   // of the centers, moved together; so their moves add up in one order
constexpr int64_t kBlockRows = 32;  // added up in float32 for the mean
constexpr double kLargeOffset = 8;  // the mean's square over the mean square distance from it
constexpr double kTight = 1e-3;     // inertia over the sum of squares below which it is not their difference
constexpr int64_t kGroups = 16;     // of centers: each has a bound of its own up to that many
constexpr float kStep = 3e-7f;      // rounding of the bounds' own steps
constexpr float kInfinity = std::numeric_limits<float>::infinity();

}  // namespace

const KMeansKernels& kernels() { return WSSS_CHOOSE_ISA(kmeans_kernels); }

Solver::Solver(const KMeansProblem& problem, double tol, int threads)
    : p_(problem),
      tol_(tol),
      depth_((problem.dim + kPadding - 1) / kPadding * kPadding),
      chunks_((depth_ + kColumns - 1) / kColumns),
      groups_(std::min(problem.clusters, kGroups)),
      trials_(kmeans_trials(problem.clusters)),
      blocks_((problem.rows + kBlockRows - 1) / kBlockRows),
      block_sums_(blocks_ * problem.dim),
      centers_(problem.clusters * depth_),
      moved_(problem.clusters * depth_),
      packed_(std::max(problem.clusters, trials_) * depth_),
      sums_(problem.clusters * depth_),
      mean_(depth_),
      norms_(problem.rows),
      row_values_(problem.rows),
      upper_(problem.rows),
      lower_(problem.rows * groups_),
      labels_(problem.rows),
      last_(problem.rows),
      near_(problem.rows),
      candidate_distances_(problem.rows * trials_),
      counts_(problem.clusters),
      center_norms_(problem.clusters),
      moves_(problem.clusters),
      chunk_moves_(problem.clusters * chunks_),
      group_moves_(groups_),
      work_size_(size_t(kRowsAtOnce) * std::max(problem.clusters, trials_) * (kPadding + 1)),
      work_(work_size_ * threads) {
  if (CoarseRows::usable(p_.clusters, depth_)) coarse_ = std::make_unique<CoarseRows>(p_.rows, p_.clusters, depth_);
}

void Solver::prepare(const Team& team) {
  for (int64_t block = team.begin(blocks_); block < team.end(blocks_); ++block) {
    const int64_t first = block * kBlockRows, rows = std::min(kBlockRows, p_.rows - first);
    kernels().block_sums(p_.x + first * p_.dim, rows, p_.dim, p_.dim, block_sums_.get() + block * p_.dim,
                         &row_values_[first]);
  }
  team.barrier();
  for (int64_t d = team.begin(p_.dim); d < team.end(p_.dim); ++d) {
    double total = 0;
    for (int64_t block = 0; block < blocks_; ++block) total += double(block_sums_.get()[block * p_.dim + d]);
    mean_.get()[d] = float(total / double(p_.rows));
  }
  team.barrier();
  if (team.thread == 0) {
    double squares = 0, offset = 0;
    finite_ = true;
    for (const double square : row_values_) {
      squares += square;
      finite_ = finite_ && square < double(std::numeric_limits<float>::max());
    }
    squares /= double(p_.rows);
    for (int64_t d = 0; d < p_.dim; ++d) offset += double(mean_.get()[d]) * double(mean_.get()[d]);
    const bool far = offset > kLargeOffset * (squares - offset), copied = far || depth_ != p_.dim;
    enough_ = tol_ * std::max(squares - offset, 0.0) / double(p_.dim);
    if (finite_ && copied) copy_ = std::make_unique<Buffer<float>>(p_.rows * depth_);
    if (!far) std::fill_n(mean_.get(), depth_, 0.0f);
    relative_ = far;
    rows_ = copied && finite_ ? copy_->get() : p_.x;
  }
  team.barrier();
  if (!finite_) return;
  for (int64_t i = team.begin(p_.rows); i < team.end(p_.rows); ++i) {
    if (copy_) row_values_[i] = kernels().centre_row(p_.x + i * p_.dim, mean_.get(), copy_->get() + i * depth_, p_.dim);
    norms_[i] = float(row_values_[i]);
  }
  team.barrier();
  if (team.thread == 0) {
    squares_ = 0;
    for (const double square : row_values_) squares_ += square;
    if (relative_) enough_ = tol_ * squares_ / (double(p_.rows) * double(p_.dim));
  }
  team.barrier();
}

void Solver::run(const Team& team, int64_t run, int64_t iterations) {
  if (p_.start) {
    for (int64_t j = team.begin(p_.clusters); j < team.end(p_.clusters); ++j) {
      kernels().centre_row(p_.start + j * p_.dim, mean_.get(), center(j), p_.dim);
    }
  } else {
    seed(team, p_.draws + run * (1 + (p_.clusters - 1) * trials_));
  }
  for (int64_t i = team.begin(p_.rows); i < team.end(p_.rows); ++i) last_[i] = -1;
  for (int64_t d = team.begin(p_.clusters * depth_); d < team.end(p_.clusters * depth_); ++d) sums_.get()[d] = 0;
  if (team.thread == 0) {
    std::fill(counts_.begin(), counts_.end(), 0);
    bounded_ = assigned_ = false;
    reread_ = p_.rows;
  }
  team.barrier();
  bool settled = false;
  int64_t done = 0;
  while (done < iterations && !settled) {
    ++done;
    if (done > 1 || p_.start) assign(team);  // seeding has found the first labels
    settled = move(team);
    if (!settled && shift_ <= enough_) break;
  }
  if (!settled) {
    assign(team);
    account(team);
  }
  for (int64_t chunk = team.begin(chunks_); chunk < team.end(chunks_); ++chunk) {
    const int64_t d = chunk * kColumns, count = std::min(kColumns, depth_ - d);
    for (int64_t j = 0; j < p_.clusters; ++j) {
      chunk_moves_[j * chunks_ + chunk] =
          kernels().spread(sums_.get() + j * depth_ + d, double(counts_[j]), count, center(j) + d);
    }
  }
  team.barrier();
  double inertia = squares_;
  for (const double part : chunk_moves_) inertia += part;
  if (inertia < kTight * squares_) {
    for (int64_t i = team.begin(p_.rows); i < team.end(p_.rows); ++i) {
      row_values_[i] = kernels().square_distance(row(i), center(labels_[i]), depth_);
    }
    team.barrier();
    inertia = 0;
    for (const double square : row_values_) inertia += square;
  }
  if (team.thread == 0) {
    better_ = run == 0 || inertia < *p_.inertia;
    if (better_) {
      *p_.inertia = inertia;
      *p_.iterations = done;
    }
  }
  team.barrier();
  if (!better_) return;
  for (int64_t i = team.begin(p_.rows); i < team.end(p_.rows); ++i) p_.labels[i] = labels_[i];
  for (int64_t j = team.begin(p_.clusters); j < team.end(p_.clusters); ++j) {
    for (int64_t d = 0; d < p_.dim; ++d) p_.centers[j * p_.dim + d] = center(j)[d] + mean_.get()[d];
  }
}

void Solver::pack(const Team& team, const float* const* others, int64_t vectors) {
  for (int64_t d = team.begin(depth_ / kPadding); d < team.end(depth_ / kPadding); ++d) {
    for (int64_t j = 0; j < vectors; ++j) {
      std::copy_n(others[j] + d * kPadding, kPadding, packed_.get() + (d * vectors + j) * kPadding);
    }
  }
  team.barrier();
}

void Solver::assign(const Team& team) {
  team.barrier();
  for (int64_t j = team.begin(p_.clusters); j < team.end(p_.clusters); ++j) {
    center_norms_[j] = float(kernels().square(center(j), depth_));
  }
  std::vector<const float*> others(p_.clusters);
  for (int64_t j = 0; j < p_.clusters; ++j) others[j] = center(j);
  pack(team, others.data(), p_.clusters);
  const float largest = *std::max_element(center_norms_.begin(), center_norms_.end());
  std::vector<int64_t> numbers = of_share(team, [&](int64_t i) { return may_change(i); });
  // Once as many rows were read as there are, the next pass reads all that may change, from a new base on.
  const bool rebase = coarse_ && reread_ >= p_.rows;
  if (rebase) {
    coarse_->rebase(team, centers_.get());
    if (team.thread == 0) {
      base_largest_ = largest;
      reread_ = 0;
    }
  } else if (coarse_) {
    coarse_->follow(team, centers_.get());
    const auto known = std::partition(numbers.begin(), numbers.end(), [&](int64_t i) { return !coarse_->kept(i); });
    std::vector<int64_t> coarse(known, numbers.end());
    numbers.erase(known, numbers.end());
    const float rounding = 2 * kRounding, most = std::max(largest, base_largest_);
    coarse_->for_bounds(coarse, norms_.data(), [&](int64_t i, const float* product, const float* error) {
      const float slack = rounding * (norms_[i] + most);
      const bool certain = set_bounds(i, product, [&](int64_t j) { return slack + 2 * error[j]; });
      if (!certain) numbers.push_back(i);
    });
  }
  for_products(team, numbers, p_.clusters, [&](int64_t i, const float* product) {
    const float slack = kRounding * (norms_[i] + largest);
    set_bounds(i, product, [=](int64_t) { return slack; });
    if (rebase) coarse_->keep(i, row(i), product);
  });
  if (!rebase) reread_ += int64_t(numbers.size());
  if (team.thread == 0) assigned_ = true;
  team.barrier();
}

bool Solver::may_change(int64_t i) {
  if (!bounded_) return true;
  const float upper = upper_[i] = (upper_[i] + moves_[labels_[i]]) * (1 + kStep);
  float* const lower = &lower_[i * groups_];
  float least = kInfinity;
  for (int64_t g = 0; g < groups_; ++g) {
    lower[g] = std::max(lower[g] - group_moves_[g], 0.0f) * (1 - kStep);
    least = std::min(least, lower[g]);
  }
  return !(upper < least);
}

template <class Error>
bool Solver::set_bounds(int64_t i, const float* product, Error&& error) {
  const auto value = [&](int64_t j) { return center_norms_[j] - 2 * product[j]; };
  int64_t label = 0;
  float nearest = kInfinity;  // a center so far away that its value is NaN is nobody's
  for (int64_t j = 0; j < p_.clusters; ++j) {
    if (value(j) < nearest) {
      nearest = value(j);
      label = j;
    }
  }
  const float norm = norms_[i];
  const float upper = upper_[i] = std::sqrt(std::max(nearest + norm, 0.0f) + error(label));
  float* const lower = &lower_[i * groups_];
  std::fill_n(lower, groups_, kInfinity);
  for (int64_t j = 0, g = 0; j < p_.clusters; ++j) {
    if (j != label) lower[g] = std::min(lower[g], value(j) - error(j));
    if (++g == groups_) g = 0;
  }
  float least = kInfinity;
  for (int64_t g = 0; g < groups_; ++g) {
    lower[g] = std::sqrt(std::max(lower[g] + norm, 0.0f));
    least = std::min(least, lower[g]);
  }
  labels_[i] = label;
  return upper < least;
}

void Solver::account(const Team& team) {
  if (team.thread == 0) {
    changed_.clear();
    for (int64_t i = 0; i < p_.rows; ++i) {
      if (labels_[i] == last_[i]) continue;
      changed_.push_back(i);
      if (last_[i] >= 0) --counts_[last_[i]];
      ++counts_[labels_[i]];
    }
    empty_ = std::count(counts_.begin(), counts_.end(), 0);
  }
  team.barrier();
  const int64_t begin = team.begin(depth_ / kPadding) * kPadding, end = team.end(depth_ / kPadding) * kPadding;
  const int64_t changed = int64_t(changed_.size());
  const auto later = [&](int64_t c) { return row(changed_[std::min(c + kRowsAtOnce, changed - 1)]); };
  for (int64_t first = 0; first < changed; first += kRowsAtOnce) {
    const int64_t last = std::min(first + kRowsAtOnce, changed);
    for (int64_t c = first; c < last; ++c) kernels().open_pages(later(c) + begin, end - begin);
    for (int64_t d = begin; d < end; d += kColumns) {
      const int64_t count = std::min(kColumns, end - d);
      for (int64_t c = first; c < last; ++c) {
        const int64_t i = changed_[c], before = last_[i];
        kernels().move_row(row(i) + d, later(c) + d, count, before >= 0 ? sums_.get() + before * depth_ + d : nullptr,
                           sums_.get() + labels_[i] * depth_ + d);
      }
    }
  }
  team.barrier();
}

bool Solver::move(const Team& team) {
  account(team);
  for (int64_t chunk = team.begin(chunks_); chunk < team.end(chunks_); ++chunk) {
    const int64_t d = chunk * kColumns, count = std::min(kColumns, depth_ - d);
    for (int64_t j = 0; j < p_.clusters; ++j) {
      if (counts_[j] == 0) continue;
      const int64_t at = j * depth_ + d;
      chunk_moves_[j * chunks_ + chunk] =
          kernels().move_center(sums_.get() + at, double(counts_[j]), count, centers_.get() + at, moved_.get() + at);
    }
  }
  if (empty_ > 0) {
    team.barrier();
    for (int64_t i = team.begin(p_.rows); i < team.end(p_.rows); ++i) {
      row_values_[i] = kernels().square_distance(row(i), center(labels_[i]), depth_);
    }
    team.barrier();
    if (team.thread == 0) fill_empty();
  }
  team.barrier();
  const bool settled = changed_.empty();
  if (team.thread == 0) {
    shift_ = 0;
    std::fill(group_moves_.begin(), group_moves_.end(), 0.0f);
    for (int64_t j = 0; j < p_.clusters; ++j) {
      double square = 0;
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) square += chunk_moves_[j * chunks_ + chunk];
      shift_ += square;
      moves_[j] = float(std::sqrt(square)) * (1 + kStep);
      group_moves_[j % groups_] = std::max(group_moves_[j % groups_], moves_[j]);
    }
    for (const int64_t i : changed_) last_[i] = labels_[i];
    bounded_ = assigned_;
    std::swap(centers_, moved_);
  }
  team.barrier();
  return settled;
}

void Solver::fill_empty() {
  std::vector<int64_t> far(p_.rows);
  for (int64_t i = 0; i < p_.rows; ++i) far[i] = i;
  const int64_t taken = std::min(empty_, p_.rows);
  std::partial_sort(far.begin(), far.begin() + taken, far.end(), [&](int64_t a, int64_t b) {
    return row_values_[a] != row_values_[b] ? row_values_[a] > row_values_[b] : a < b;
  });
  std::vector<int64_t> counts = counts_;
  const Buffer<double> sums(p_.clusters * depth_);
  std::copy_n(sums_.get(), p_.clusters * depth_, sums.get());
  if (row_values_[far[0]] > 0) {
    int64_t next = 0;
    for (int64_t j = 0; j < p_.clusters; ++j) {
      if (counts_[j] != 0) continue;
      const int64_t i = far[next++];
      kernels().move_row(row(i), row(i), depth_, sums.get() + labels_[i] * depth_, nullptr);
      --counts[labels_[i]];
      std::copy_n(row(i), depth_, sums.get() + j * depth_);
      counts[j] = 1;
    }
  }
  const int64_t heaviest = std::max_element(counts.begin(), counts.end()) - counts.begin();
  for (int64_t j = 0; j < p_.clusters; ++j) {
    const int64_t from = counts[j] > 0 ? j : heaviest;
    std::fill_n(&chunk_moves_[j * chunks_], chunks_, 0.0);
    chunk_moves_[j * chunks_] = kernels().move_center(sums.get() + from * depth_, double(counts[from]), depth_,
                                                      center(j), moved_.get() + j * depth_);
  }
}

}  // namespace kmeans
}  // namespace wsss
