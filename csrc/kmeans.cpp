#include "kmeans.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <utility>

#include "common/buffer.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "kmeans_kernels.h"

namespace wsss {

WSSS_FOR_EACH_ISA(extern const KMeansKernels kmeans_kernels;)

namespace {

const KMeansKernels& kernels() { return WSSS_CHOOSE_ISA(kmeans_kernels); }

constexpr int64_t kColumns = 256;   // of the centers, moved together; so their moves add up in one order
constexpr int64_t kBlockRows = 32;  // added up in float32 for the mean
constexpr double kLargeOffset = 8;  // the mean's square over the mean square distance from it
constexpr double kTight = 1e-3;     // inertia over the sum of squares below which it is not their difference
constexpr int64_t kGroups = 16;     // of centers: each has a bound of its own up to that many
constexpr float kRounding = 3e-6f;  // of a product in float32, of the two squares' sum; and of the bounds' own steps
constexpr float kStep = 3e-7f;
constexpr double kProductsPerThread = 2e5;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// One problem; every thread of a team calls the same methods, which meet at the team's barriers.
class Solver {
 public:
  Solver(const KMeansProblem& problem, double tol, int threads)
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
        work_(work_size_ * threads) {}

  bool finite() const { return finite_; }

  // The rows to work on: x itself, or a copy relative to the mean where rounding by a large offset would show, or where
  // rows need padding.
  void prepare(const Team& team) {
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
      if (copy_)
        row_values_[i] = kernels().centre_row(p_.x + i * p_.dim, mean_.get(), copy_->get() + i * depth_, p_.dim);
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

  void run(const Team& team, int64_t run, int64_t iterations) {
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

 private:
  const float* row(int64_t i) const { return rows_ + i * depth_; }
  float* center(int64_t j) const { return centers_.get() + j * depth_; }

  // For the products: kPadding values of every vector, the next kPadding of every vector, ...
  void pack(const Team& team, const float* const* others, int64_t vectors) {
    for (int64_t d = team.begin(depth_ / kPadding); d < team.end(depth_ / kPadding); ++d) {
      for (int64_t j = 0; j < vectors; ++j) {
        std::copy_n(others[j] + d * kPadding, kPadding, packed_.get() + (d * vectors + j) * kPadding);
      }
    }
    team.barrier();
  }

  // body(row number, its products with the packed vectors) for the rows of the thread's share that wanted(row).
  template <class Wanted, class Body>
  void for_products(const Team& team, int64_t vectors, Wanted&& wanted, Body&& body) {
    float* const partial = work_.get() + work_size_ * team.thread;
    float* const out = partial + size_t(kRowsAtOnce) * vectors * kPadding;
    const float* rows[2 * kRowsAtOnce];  // the second half is fetched while the first is worked on
    int64_t numbers[2 * kRowsAtOnce];
    int count = 0;
    std::fill_n(rows, 2 * kRowsAtOnce, row(0));
    const auto take = [&](int taken) {
      kernels().products(rows, rows + kRowsAtOnce, taken, packed_.get(), vectors, depth_, out, partial);
      for (int r = 0; r < taken; ++r) body(numbers[r], out + r * vectors);
      std::copy(rows + taken, rows + count, rows);
      std::copy(numbers + taken, numbers + count, numbers);
      count -= taken;
    };
    for (int64_t i = team.begin(p_.rows); i < team.end(p_.rows); ++i) {
      if (!wanted(i)) continue;
      rows[count] = row(i);
      numbers[count++] = i;
      if (count == 2 * kRowsAtOnce) take(kRowsAtOnce);
    }
    while (count > 0) take(std::min(count, kRowsAtOnce));
  }

  // Greedy k-means++: of a few candidates drawn by their squared distance, the one that leaves the least.
  void seed(const Team& team, const double* draws) {
    const int64_t first = std::min(int64_t(draws[0] * double(p_.rows)), p_.rows - 1);
    std::vector<const float*> others{row(first)};
    std::vector<float> apart;  // squares of the distances between candidates and the centers so far
    pack(team, others.data(), 1);
    for_products(
        team, 1, [](int64_t) { return true; },
        [&](int64_t i, const float* product) {
          upper_[i] = std::max(norms_[i] + norms_[first] - 2 * product[0], 0.0f);
          near_[i] = 0;
        });
    team.barrier();
    if (team.thread == 0) chosen_.assign(1, first);
    for (int64_t j = 1; j < p_.clusters; ++j) {
      if (team.thread == 0) draw(draws + 1 + (j - 1) * trials_);
      team.barrier();
      others.clear();
      for (const int64_t candidate : candidates_) others.push_back(row(candidate));
      pack(team, others.data(), trials_);
      apart.resize(j * trials_);
      for (int64_t t = 0; t < trials_; ++t) {
        for (int64_t c = 0; c < j; ++c) {
          apart[c * trials_ + t] = float(kernels().square_distance(others[t], row(chosen_[c]), depth_));
        }
      }
      // A candidate twice as far from a row's center as the row is cannot be nearer.
      const auto may_be_nearer = [&](int64_t i) {
        const float* const far = &apart[near_[i] * trials_];
        const float reach = 4 * upper_[i] + kRounding * 8 * (norms_[i] + upper_[i]);
        for (int64_t t = 0; t < trials_; ++t) {
          if (far[t] <= reach) return true;
        }
        std::fill_n(&candidate_distances_[i * trials_], trials_, upper_[i]);
        return false;
      };
      for_products(team, trials_, may_be_nearer, [&](int64_t i, const float* product) {
        for (int64_t t = 0; t < trials_; ++t) {
          const float square = std::max(norms_[i] + norms_[candidates_[t]] - 2 * product[t], 0.0f);
          candidate_distances_[i * trials_ + t] = std::min(upper_[i], square);
        }
      });
      team.barrier();
      if (team.thread == 0) choose();
      team.barrier();
      for (int64_t i = team.begin(p_.rows); i < team.end(p_.rows); ++i) {
        const float square = candidate_distances_[i * trials_ + best_];
        if (square < upper_[i]) near_[i] = j;
        upper_[i] = square;
      }
      team.barrier();
    }
    team.barrier();
    for (int64_t j = team.begin(p_.clusters); j < team.end(p_.clusters); ++j) {
      std::copy_n(row(chosen_[j]), depth_, center(j));
    }
    for (int64_t i = team.begin(p_.rows); i < team.end(p_.rows); ++i) labels_[i] = near_[i];
  }

  void draw(const double* draws) {
    double total = 0;
    for (int64_t i = 0; i < p_.rows; ++i) row_values_[i] = total += double(upper_[i]);
    candidates_.resize(trials_);
    for (int64_t t = 0; t < trials_; ++t) {
      const auto place = std::lower_bound(row_values_.begin(), row_values_.end(), draws[t] * total);
      candidates_[t] = std::min(int64_t(place - row_values_.begin()), p_.rows - 1);
    }
  }

  void choose() {
    double least = 0;
    for (int64_t t = 0; t < trials_; ++t) {
      double left = 0;
      for (int64_t i = 0; i < p_.rows; ++i) left += double(candidate_distances_[i * trials_ + t]);
      if (t == 0 || left < least) {
        least = left;
        best_ = t;
      }
    }
    chosen_.push_back(candidates_[best_]);
  }

  // labels_ of the centers; upper_ and lower_ bound the distance to the own center and to each group of others.
  void assign(const Team& team) {
    team.barrier();
    for (int64_t j = team.begin(p_.clusters); j < team.end(p_.clusters); ++j) {
      center_norms_[j] = float(kernels().square(center(j), depth_));
    }
    team.barrier();
    std::vector<const float*> others(p_.clusters);
    for (int64_t j = 0; j < p_.clusters; ++j) others[j] = center(j);
    pack(team, others.data(), p_.clusters);
    const float largest = *std::max_element(center_norms_.begin(), center_norms_.end());
    const auto may_change = [&](int64_t i) {
      if (!bounded_) return true;
      const float upper = upper_[i] = (upper_[i] + moves_[labels_[i]]) * (1 + kStep);
      float* const lower = &lower_[i * groups_];
      float least = kInfinity;
      for (int64_t g = 0; g < groups_; ++g) {
        lower[g] = std::max(lower[g] - group_moves_[g], 0.0f) * (1 - kStep);
        least = std::min(least, lower[g]);
      }
      return !(upper < least);
    };
    for_products(team, p_.clusters, may_change, [&](int64_t i, const float* product) {
      int64_t label = 0;
      float nearest = kInfinity;
      for (int64_t j = 0; j < p_.clusters; ++j) {
        const float value = center_norms_[j] - 2 * product[j];
        if (value < nearest) {
          nearest = value;
          label = j;
        }
      }
      labels_[i] = label;
      const float norm = norms_[i], slack = kRounding * (norm + largest);
      upper_[i] = std::sqrt(std::max(nearest + norm, 0.0f) + slack);
      float* const lower = &lower_[i * groups_];
      std::fill_n(lower, groups_, kInfinity);
      for (int64_t j = 0; j < p_.clusters; ++j) {
        if (j != label) lower[j % groups_] = std::min(lower[j % groups_], center_norms_[j] - 2 * product[j]);
      }
      for (int64_t g = 0; g < groups_; ++g) lower[g] = std::sqrt(std::max(lower[g] + norm - slack, 0.0f));
    });
    if (team.thread == 0) assigned_ = true;
    team.barrier();
  }

  // Sums and numbers of rows of the centers after labels_; changed_ lists the rows that moved.
  void account(const Team& team) {
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

  // Centers to the means of their rows; -> whether no label changed. shift_: the sum of the squared moves.
  bool move(const Team& team) {
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

  // As scikit-learn: each center without rows takes the row farthest from its own center away from that center.
  void fill_empty() {
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
  std::vector<int64_t> chosen_, candidates_, changed_;
  int64_t best_ = 0, empty_ = 0;
  double enough_ = 0, shift_ = 0, squares_ = 0;
  bool finite_ = false, relative_ = false, bounded_ = false, assigned_ = false, better_ = false;
};

bool solve(const KMeansProblem& problem, int64_t iterations, double tol, int threads) {
  Solver solver(problem, tol, threads);
  parallel(threads, [&](const Team& team) {
    solver.prepare(team);
    if (!solver.finite()) return;
    for (int64_t run = 0; run < problem.runs; ++run) {
      solver.run(team, run, iterations);
      team.barrier();
    }
  });
  return solver.finite();
}

int worthwhile(const KMeansProblem& problem, int threads) {
  const double products = double(problem.rows) * double(problem.dim) * double(problem.clusters);
  return worthwhile_threads(threads, products, kProductsPerThread);
}

}  // namespace

int64_t kmeans_trials(int64_t clusters) { return 2 + int64_t(std::log(double(clusters))); }

int64_t kmeans_cpu(const std::vector<KMeansProblem>& problems, int64_t iterations, double tol, int threads) {
  threads = usable_threads(threads);
  const int64_t count = int64_t(problems.size());
  std::atomic<int64_t> next{0}, bad{count};
  const auto note = [&](int64_t i) {
    int64_t first = bad;
    while (i < first && !bad.compare_exchange_weak(first, i)) {
    }
  };
  // Large problems one after another by the whole team, small ones side by side by a thread each.
  std::vector<int64_t> small;
  for (int64_t i = 0; i < count; ++i) {
    if (worthwhile(problems[i], threads) < threads) {
      small.push_back(i);
    } else if (!solve(problems[i], iterations, tol, threads)) {
      note(i);
    }
  }
  const int team = int(std::min<int64_t>(threads, int64_t(small.size())));
  if (team == 1) {
    for (const int64_t i : small) {
      if (!solve(problems[i], iterations, tol, worthwhile(problems[i], threads))) note(i);
    }
  } else if (team > 1) {
    parallel(team, [&](const Team&) {
      for (int64_t i = next++; i < int64_t(small.size()); i = next++) {
        if (!solve(problems[small[i]], iterations, tol, 1)) note(small[i]);
      }
    });
  }
  return bad < count ? int64_t(bad) : -1;
}

}  // namespace wsss
