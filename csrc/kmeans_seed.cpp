#include <algorithm>

#include "kmeans_solver.h"

namespace wsss {
namespace kmeans {

void Solver::seed(const Team& team, const double* draws) {
  const int64_t first = std::min(int64_t(draws[0] * double(p_.rows)), p_.rows - 1);
  std::vector<const float*> others{row(first)};
  std::vector<float> apart;  // squares of the distances between candidates and the centers so far
  pack(team, others.data(), 1);
  for_products(team, of_share(team, [](int64_t) { return true; }), 1, [&](int64_t i, const float* product) {
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
    for_products(team, of_share(team, may_be_nearer), trials_, [&](int64_t i, const float* product) {
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

void Solver::draw(const double* draws) {
  double total = 0;
  for (int64_t i = 0; i < p_.rows; ++i) row_values_[i] = total += double(upper_[i]);
  candidates_.resize(trials_);
  for (int64_t t = 0; t < trials_; ++t) {
    const auto place = std::lower_bound(row_values_.begin(), row_values_.end(), draws[t] * total);
    candidates_[t] = std::min(int64_t(place - row_values_.begin()), p_.rows - 1);
  }
}

void Solver::choose() {
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

}  // namespace kmeans
}  // namespace wsss
