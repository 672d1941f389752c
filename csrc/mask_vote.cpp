#include "mask_vote.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "common/buffer.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "mask_vote_kernels.h"

namespace wsss {

WSSS_FOR_EACH_ISA(extern const VoteKernels vote_kernels;)

namespace {

const VoteKernels& kernels() { return WSSS_CHOOSE_ISA(vote_kernels); }

// Values a thread should have to add: some tens of microseconds.
constexpr double kValuesPerThread = 6e4;
// Pixels of a band. Bands are shared out to threads; sums are taken over each and then over them, so they depend on
// the picture alone.
constexpr int kBand = 8192;
// Bands whose sums are kept apart, at most; fewer where there are many segments.
constexpr int kMostParts = 8;

double total_of(const double* lanes) {
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

int band_end(int band, int pixels) { return int(std::min<int64_t>(int64_t(band + 1) * kBand, pixels)); }

// Numbers the segments 0, 1, ... in some order that the ids alone decide; -1 for a negative id. Returns how many.
class Numbering {
 public:
  Numbering(const std::vector<const int64_t*>& ids, const std::vector<int>& counts, int64_t pixels) {
    int64_t largest = -1;
    smallest_ = std::numeric_limits<int64_t>::max();
    for (size_t band = 0; band < ids.size(); ++band) {
      for (int i = 0; i < counts[band]; ++i) {
        const int64_t id = ids[band][i];
        if (id < 0) continue;
        largest = std::max(largest, id);
        smallest_ = std::min(smallest_, id);
      }
    }
    if (largest < 0) return;
    if (largest - smallest_ < pixels) {
      count_ = int(largest - smallest_ + 1);
      return;
    }
    for (size_t band = 0; band < ids.size(); ++band) {
      for (int i = 0; i < counts[band]; ++i) {
        if (ids[band][i] >= 0) sorted_.push_back(ids[band][i]);
      }
    }
    std::sort(sorted_.begin(), sorted_.end());
    sorted_.erase(std::unique(sorted_.begin(), sorted_.end()), sorted_.end());
    count_ = int(sorted_.size());
  }

  int count() const { return count_; }
  int operator()(int64_t id) const {
    if (id < 0) return -1;
    if (sorted_.empty()) return int(id - smallest_);
    return int(std::lower_bound(sorted_.begin(), sorted_.end(), id) - sorted_.begin());
  }

 private:
  int64_t smallest_;
  int count_ = 0;
  std::vector<int64_t> sorted_;  // empty: the ids lie close enough to count from the smallest
};

}  // namespace

template <class Id>
void segment_vote_cpu(const float* maps, const Id* segments, float* out, VoteShape shape, bool maximum, int threads) {
  const int pixels = int(shape.pixels), channels = int(shape.channels);
  if (pixels == 0 || channels == 0) return;
  threads = worthwhile_threads(usable_threads(threads), double(pixels) * channels, kValuesPerThread);
  const int bands = (pixels + kBand - 1) / kBand;
  const Buffer<Run> runs(pixels + bands);
  const Buffer<int64_t> ids(pixels);
  std::vector<int> counts(bands);
  std::vector<const int64_t*> band_ids(bands);
  const auto runs_of = [&](int band) { return runs.get() + int64_t(band) * (kBand + 1); };
  for (int band = 0; band < bands; ++band) band_ids[band] = ids.get() + int64_t(band) * kBand;
  parallel(threads, [&](const Team& team) {
    for (int band = int(team.begin(bands)); band < team.end(bands); ++band) {
      int64_t* const own_ids = ids.get() + int64_t(band) * kBand;
      const int end = band_end(band, pixels);
      if constexpr (std::is_same_v<Id, int32_t>) {
        counts[band] = kernels().find_runs32(segments, band * kBand, end, runs_of(band), own_ids);
      } else {
        counts[band] = kernels().find_runs64(segments, band * kBand, end, runs_of(band), own_ids);
      }
    }
  });
  const Numbering number(band_ids, counts, pixels);
  const int slots = number.count();
  const int parts = std::max<int64_t>(1, std::min<int64_t>({kMostParts, bands, pixels / (16 * int64_t(slots) + 1)}));
  const int64_t lanes = maximum ? 1 : kVoteLanes, part_size = lanes * slots;
  const Buffer<double> sums(maximum ? 0 : channels * parts * part_size);
  const Buffer<float> peaks(maximum ? channels * parts * part_size : 0);
  const Buffer<float> scores(int64_t(channels) * slots);
  std::vector<double> sizes(slots);
  expect_writes(out, sizeof(float) * pixels * channels);
  parallel(threads, [&](const Team& team) {
    for (int band = int(team.begin(bands)); band < team.end(bands); ++band) {
      for (int i = 0; i < counts[band]; ++i) runs_of(band)[i].slot = number(band_ids[band][i]);
    }
    team.barrier();
    if (team.thread == 0) {
      for (int band = 0; band < bands; ++band) {
        for (const Run* run = runs_of(band); run < runs_of(band) + counts[band]; ++run) {
          if (run->slot >= 0) sizes[run->slot] += run[1].begin - run[0].begin;
        }
      }
    }
    const int64_t tasks = int64_t(channels) * parts;
    for (int64_t task = team.begin(tasks); task < team.end(tasks); ++task) {
      const float* const map = maps + task / parts * pixels;
      const int64_t part = task % parts;
      if (maximum) {
        std::fill_n(peaks.get() + task * part_size, part_size, -std::numeric_limits<float>::infinity());
      } else {
        std::fill_n(sums.get() + task * part_size, part_size, 0.0);
      }
      for (int64_t band = bands * part / parts; band < bands * (part + 1) / parts; ++band) {
        if (maximum) {
          kernels().max_runs(map, runs_of(int(band)), counts[band], peaks.get() + task * part_size);
        } else {
          kernels().add_runs(map, pixels, runs_of(int(band)), counts[band], sums.get() + task * part_size);
        }
      }
    }
    team.barrier();
    const int64_t voices = int64_t(channels) * slots;
    for (int64_t voice = team.begin(voices); voice < team.end(voices); ++voice) {
      const int64_t first = voice / slots * parts * part_size + voice % slots * lanes;
      double sum = 0;
      float peak = -std::numeric_limits<float>::infinity();
      for (int part = 0; part < parts; ++part) {
        if (maximum) {
          const float other = peaks.get()[first + part * part_size];
          peak = other > peak || std::isnan(other) ? other : peak;
        } else {
          sum += total_of(sums.get() + first + part * part_size);
        }
      }
      scores.get()[voice] = maximum ? peak : float(sum / sizes[voice % slots]);
    }
    team.barrier();
    const int64_t fills = int64_t(channels) * bands;
    for (int64_t fill = team.begin(fills); fill < team.end(fills); ++fill) {
      const int64_t channel = fill / bands;
      const int band = int(fill % bands);
      kernels().fill_runs(maps + channel * pixels, scores.get() + channel * slots, runs_of(band), counts[band],
                          out + channel * pixels);
    }
  });
}

template void segment_vote_cpu(const float*, const int32_t*, float*, VoteShape, bool, int);
template void segment_vote_cpu(const float*, const int64_t*, float*, VoteShape, bool, int);

void mask_vote_cpu(const float* maps, const uint8_t* masks, float* out, VoteShape shape, int64_t masks_count,
                   bool maximum, int threads) {
  const int pixels = int(shape.pixels);
  const int64_t channels = shape.channels;
  if (pixels == 0 || channels == 0) return;
  threads =
      worthwhile_threads(usable_threads(threads), double(pixels) * double(channels + masks_count), kValuesPerThread);
  const int bands = (pixels + kBand - 1) / kBand, parts = std::min(bands, kMostParts);
  const int64_t voices = masks_count * channels;
  const float lowest = -std::numeric_limits<float>::infinity();
  const Buffer<double> sums(maximum ? 0 : parts * voices * kVoteLanes);
  const Buffer<float> peaks(maximum ? parts * voices : 0), scores(voices), votes(int64_t(kBand) * threads);
  std::vector<int> sizes(parts * masks_count);
  struct Span {
    int begin, end;
  };
  std::vector<Span> spans(bands * masks_count);  // of a mask's pixels in a band: most masks reach into few
  expect_writes(out, sizeof(float) * pixels * channels);
  parallel(threads, [&](const Team& team) {
    const int64_t tasks = parts * masks_count;  // a part of the picture at a time: its maps stay in the cache
    for (int64_t task = team.begin(tasks); task < team.end(tasks); ++task) {
      const int64_t part = task / masks_count, mask = task % masks_count, first = task * channels;
      const int begin = int(bands * part / parts) * kBand, end = band_end(int(bands * (part + 1) / parts) - 1, pixels);
      if (maximum) {
        std::fill_n(peaks.get() + first, channels, lowest);
      } else {
        std::fill_n(sums.get() + first * kVoteLanes, channels * kVoteLanes, 0.0);
      }
      const uint8_t* const set = masks + mask * pixels;
      for (int x = kernels().find_set(set, begin, end); x < end;) {
        const Run run[2] = {{x, 0}, {kernels().find_clear(set, x, end), 0}};
        sizes[task] += run[1].begin - x;
        for (int band = x / kBand; band <= (run[1].begin - 1) / kBand; ++band) {
          Span& span = spans[band * masks_count + mask];
          if (span.end == 0) span.begin = std::max(x, band * kBand);
          span.end = std::min(run[1].begin, band_end(band, pixels));
        }
        for (int64_t c = 0; c < channels; ++c) {
          if (maximum) {
            kernels().max_runs(maps + c * pixels, run, 1, peaks.get() + first + c);
          } else {
            kernels().add_runs(maps + c * pixels, pixels, run, 1, sums.get() + (first + c) * kVoteLanes);
          }
        }
        x = kernels().find_set(set, run[1].begin, end);
      }
    }
    team.barrier();
    for (int64_t voice = team.begin(voices); voice < team.end(voices); ++voice) {
      double sum = 0, size = 0;
      float peak = lowest;
      for (int part = 0; part < parts; ++part) {
        size += sizes[part * masks_count + voice / channels];
        if (maximum) {
          const float other = peaks.get()[part * voices + voice];
          peak = other > peak || std::isnan(other) ? other : peak;
        } else {
          sum += total_of(sums.get() + (part * voices + voice) * kVoteLanes);
        }
      }
      scores.get()[voice] = maximum ? peak : float(sum / size);  // no pixel, no vote
    }
    team.barrier();
    float* const own_votes = votes.get() + int64_t(kBand) * team.thread;
    for (int64_t band = team.begin(bands); band < team.end(bands); ++band) {
      const int begin = int(band) * kBand, count = band_end(int(band), pixels) - begin;
      std::fill_n(own_votes, count, 0.0f);
      for (int64_t c = 0; c < channels; ++c) std::fill_n(out + c * pixels + begin, count, maximum ? lowest : 0.0f);
      for (int64_t mask = 0; mask < masks_count; ++mask) {
        const uint8_t* const set = masks + mask * pixels;
        const Span span = spans[band * masks_count + mask];
        for (int x = span.begin; x < span.end;) {
          const int end = kernels().find_clear(set, x, span.end);
          kernels().count_votes(own_votes, x - begin, end - begin);
          for (int64_t c = 0; c < channels; ++c) {
            kernels().vote(out + c * pixels, x, end, scores.get()[mask * channels + c], maximum);
          }
          x = kernels().find_set(set, end, span.end);
        }
      }
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t at = c * pixels + begin;
        kernels().settle(maps + at, own_votes, out + at, count, maximum);
      }
    }
  });
}

}  // namespace wsss
