// The parts of mask_vote.cpp that are compiled once for each instruction set.
#pragma once
#include <cstddef>
#include <cstdint>

namespace wsss {

// Neighbouring pixels of one segment; it ends where the next one begins.
struct Run {
  int32_t begin;
  int32_t slot;  // of its segment, < 0: none
};

inline constexpr int kVoteLanes = 8;  // partial sums a segment has, whatever the instruction set

struct VoteKernels {
  // Runs of equal ids in [begin, end), closed by one that begins at end; their ids to run_ids. Returns their number.
  int (*find_runs32)(const int32_t* ids, int begin, int end, Run* runs, int64_t* run_ids);
  int (*find_runs64)(const int64_t* ids, int begin, int end, Run* runs, int64_t* run_ids);
  // The first pixel >= begin whose mask is (is not) set, end if there is none.
  int (*find_set)(const uint8_t* mask, int begin, int end);
  int (*find_clear)(const uint8_t* mask, int begin, int end);
  // sums[slot][kVoteLanes] += the map's values over each run; the map has `pixels` values.
  void (*add_runs)(const float* map, int pixels, const Run* runs, int count, double* sums);
  // peaks[slot] = max(peaks[slot], values); NaN wins.
  void (*max_runs)(const float* map, const Run* runs, int count, float* peaks);
  // out over each run = score[slot], or the map where there is none.
  void (*fill_runs)(const float* map, const float* score, const Run* runs, int count, float* out);
  // out[begin, end) += score, or the larger.
  void (*vote)(float* out, int begin, int end, float score, bool maximum);
  void (*count_votes)(float* votes, int begin, int end);
  // out /= votes (mean only), or the map where there are none.
  void (*settle)(const float* map, const float* votes, float* out, int count, bool maximum);
};

}  // namespace wsss
