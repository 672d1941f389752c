#include "common/simd.h"
#include "mask_vote_kernels.h"

namespace wsss {
namespace WSSS_ISA {

constexpr int n = kLanes<float>;
using V = Vec<float>;

typedef float Floats __attribute__((vector_size(4 * kVoteLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kVoteLanes)));
typedef double Doubles __attribute__((vector_size(8 * kVoteLanes)));

template <class Id>
WSSS_ALWAYS_INLINE int find_runs(const Id* ids, int begin, int end, Run* runs, int64_t* run_ids) {
  int count = 0;
  for (int i = begin; i < end; ++count) {
    const Id id = ids[i];
    runs[count].begin = i;
    run_ids[count] = id;
    while (++i < end && ids[i] == id) {
    }
  }
  runs[count] = {end, -1};
  return count;
}
int find_runs32(const int32_t* ids, int begin, int end, Run* runs, int64_t* run_ids) {
  return find_runs(ids, begin, end, runs, run_ids);
}
int find_runs64(const int64_t* ids, int begin, int end, Run* runs, int64_t* run_ids) {
  return find_runs(ids, begin, end, runs, run_ids);
}

// Many mask bytes a step: masks are large and mostly empty or full. Any byte but 0 is set.
template <bool Set>
WSSS_ALWAYS_INLINE int skip(const uint8_t* mask, int begin, int end) {
  constexpr uint64_t whole = Set ? 0x0101010101010101u : 0u;
  for (; begin + 32 <= end; begin += 32) {
    uint64_t words[4];
    std::memcpy(words, mask + begin, sizeof words);
    if ((words[0] ^ whole) | (words[1] ^ whole) | (words[2] ^ whole) | (words[3] ^ whole)) break;
  }
  for (; begin + 8 <= end; begin += 8) {
    uint64_t word;
    std::memcpy(&word, mask + begin, sizeof word);
    if (word != whole) break;
  }
  while (begin < end && (mask[begin] != 0) == Set) ++begin;
  return begin;
}
int find_set(const uint8_t* mask, int begin, int end) { return skip<false>(mask, begin, end); }
int find_clear(const uint8_t* mask, int begin, int end) { return skip<true>(mask, begin, end); }

void add_runs(const float* map, int pixels, const Run* runs, int count, double* sums) {
  const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7};
  for (int i = 0; i < count; ++i) {
    if (runs[i].slot < 0) continue;
    double* const own = sums + size_t(runs[i].slot) * kVoteLanes;
    Doubles total;
    std::memcpy(&total, own, sizeof total);
    const int end = runs[i + 1].begin;
    for (int x = runs[i].begin; x < end; x += kVoteLanes) {
      Floats v{};
      if (x + kVoteLanes <= pixels) {
        std::memcpy(&v, map + x, sizeof v);
        v = lane < end - x ? v : Floats{};
      } else {
        for (int k = 0; k < end - x; ++k) v[k] = map[x + k];
      }
      total += __builtin_convertvector(v, Doubles);
    }
    std::memcpy(own, &total, sizeof total);
  }
}

void max_runs(const float* map, const Run* runs, int count, float* peaks) {
  for (int i = 0; i < count; ++i) {
    if (runs[i].slot < 0) continue;
    float peak = peaks[runs[i].slot];
    for (int x = runs[i].begin; x < runs[i + 1].begin; ++x) {
      const float v = map[x];
      peak = v > peak || v != v ? v : peak;  // NaN, once here, is not exceeded
    }
    peaks[runs[i].slot] = peak;
  }
}

void fill_runs(const float* map, const float* score, const Run* runs, int count, float* out) {
  const int limit = runs[count].begin;
  for (int i = 0; i < count; ++i) {
    const int end = runs[i + 1].begin;
    int x = runs[i].begin;
    if (runs[i].slot < 0) {
      std::memcpy(out + x, map + x, (end - x) * sizeof(float));
      continue;
    }
    const V v = splat(score[runs[i].slot]);
    for (; x < end && x + n <= limit; x += n) store(out + x, v);  // past its end: the runs to come overwrite that
    if (x < end) store_some(out + x, v, end - x);
  }
}

void vote(float* out, int begin, int end, float score, bool maximum) {
  if (!maximum) {
    for (int x = begin; x < end; ++x) out[x] += score;
    return;
  }
  for (int x = begin; x < end; ++x) out[x] = score > out[x] || score != score ? score : out[x];
}

void count_votes(float* votes, int begin, int end) {
  for (int x = begin; x < end; ++x) votes[x] += 1.0f;
}

void settle(const float* map, const float* votes, float* out, int count, bool maximum) {
  for (int x = 0; x < count; ++x) {
    const float voted = maximum ? out[x] : out[x] / (votes[x] > 0.0f ? votes[x] : 1.0f);
    out[x] = votes[x] > 0.0f ? voted : map[x];
  }
}

extern const VoteKernels vote_kernels;
const VoteKernels vote_kernels = {find_runs32, find_runs64, find_set, find_clear,  add_runs,
                                  max_runs,    fill_runs,   vote,     count_votes, settle};

}  // namespace WSSS_ISA
}  // namespace wsss
