#include "random_walk.h"

#include <cstring>
#include <vector>

#include "common/buffer.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "random_walk_kernels.h"
#include "random_walk_series.h"

namespace wsss {

#define WSSS_WALK_TABLES                              \
  extern const WalkKernels<float> walk_kernels_float; \
  extern const WalkKernels<double> walk_kernels_double;
WSSS_FOR_EACH_ISA(WSSS_WALK_TABLES)

template <>
const WalkKernels<float>& walk_kernels<float>() {
  return WSSS_CHOOSE_ISA(walk_kernels_float);
}
template <>
const WalkKernels<double>& walk_kernels<double>() {
  return WSSS_CHOOSE_ISA(walk_kernels_double);
}

namespace {

// A thread's share of a step, in pixels times maps, that takes some ten times as long as meeting the others after it.
constexpr double kPixelsPerThread = 1000;

template <class T>
class Walker {
 public:
  Walker(const WalkShape& shape, const WalkOptions& options, int maps, int states, bool gradient, int threads)
      : kernels(walk_kernels<T>()),
        positions_(layout(shape, options.radius)),
        weights_(weights_size()),
        inverse_(plan.inverse_row(plan.height)),
        gradient_(gradient ? weights_size() : 0),
        states_(plan.state_size(maps) * states),
        scratch_(2 * walk_scratch_size(plan) * threads),
        state_size_(plan.state_size(maps)) {
    plan.position = positions_.data();
    plan.weights = weights_.get();
    plan.inverse = inverse_.get();
    plan.gradient = gradient ? gradient_.get() : nullptr;
  }
  Walker(const Walker&) = delete;

  static size_t weight_bytes(const WalkShape& shape, int radius) {
    return size_t(neighbour_count(radius)) * shape.height * shape.width * sizeof(T);
  }

  T* state(int index) const { return states_.get() + state_size_ * index; }
  T* scratch(const Team& team) const { return scratch_.get() + 2 * walk_scratch_size(plan) * team.thread; }
  int first_row(const Team& team) const { return int(team.begin(plan.height)); }
  int last_row(const Team& team) const { return int(team.end(plan.height)); }

  void load_affinity(const Team& team, const float* affinity, double beta) const {
    if (team.thread == 0) std::memset(plan.weights, 0, plan.weight_row(0) * sizeof(T));
    kernels.pack_weights(plan, affinity, beta, scratch(team), first_row(team), last_row(team));
    team.barrier();
    kernels.invert_degrees(plan, first_row(team), last_row(team));
    if (plan.gradient) {
      const size_t from = plan.weight_row(first_row(team)), to = plan.weight_row(last_row(team));
      std::memset(plan.gradient + from, 0, (to - from) * sizeof(T));
    }
    team.barrier();
  }

  // The rows above and below the map are read (times a weight of 0) and never written.
  void clear_outer_rows(const Team& team, int states, int maps) const {
    if (team.thread != 0) return;
    const size_t top = plan.state_row(0, maps), bottom = plan.state_row(plan.height, maps);
    for (int i = 0; i < states; ++i) {
      std::memset(state(i), 0, top * sizeof(T));
      std::memset(state(i) + bottom, 0, (plan.state_size(maps) - bottom) * sizeof(T));
    }
  }

  void step(const Team& team, int maps, const WalkStep<T>& step) const {
    kernels.step[maps](plan, step, first_row(team), last_row(team));
    team.barrier();
  }

  // f(first, last): the values of this thread's rows in a state.
  template <class Body>
  void own_values(const Team& team, int maps, Body&& body) const {
    const size_t end = plan.state_row(last_row(team), maps);
    for (size_t i = plan.state_row(first_row(team), maps); i < end; ++i) body(i);
  }

  WalkPlan<T> plan;
  const WalkKernels<T>& kernels;

 private:
  std::vector<ptrdiff_t> layout(const WalkShape& shape, int radius) {
    const int lanes = walk_kernels<T>().lanes;
    const Neighbourhood hood = make_neighbourhood(radius);
    plan = {};
    plan.height = int(shape.height);
    plan.width = int(shape.width);
    plan.radius = radius;
    plan.halo = radius - 1;
    plan.lanes = lanes;
    plan.blocks = int((shape.width + lanes - 1) / lanes);
    std::vector<int> left_of(2 * radius + 1, 0);  // how many offsets have dx < i - radius
    for (int k = 0; k < hood.count; ++k) {
      int slot = 0;
      for (int other = 0; other < hood.count; ++other) {
        slot += hood.dx[other] < hood.dx[k] || (hood.dx[other] == hood.dx[k] && hood.dy[other] < hood.dy[k]);
      }
      plan.slot[k] = slot;
      for (int dx = hood.dx[k] + 1; dx <= radius; ++dx) ++left_of[dx + radius];
    }
    // A position h to the left of the row keeps only offsets with dx >= h, one h to the right only dx <= -h.
    std::vector<ptrdiff_t> positions;
    int next = 0;
    for (int t = -plan.halo; t < plan.blocks + plan.halo; ++t) {
      const int over = t < 0 ? -t : t >= plan.blocks ? t - plan.blocks + 1 : 0;
      const int skipped = t < 0 ? left_of[over + radius] : 0;
      const int kept = t < 0 ? hood.count - skipped : over ? left_of[radius - over + 1] : hood.count;
      positions.push_back(ptrdiff_t(next - skipped) * lanes);
      next += kept;
    }
    plan.weights_per_row = next;
    return positions;
  }
  size_t weights_size() const { return plan.weight_row(plan.height); }

  std::vector<ptrdiff_t> positions_;
  Buffer<T> weights_, inverse_, gradient_, states_, scratch_;
  size_t state_size_;
};

struct Chunk {
  const float* in[kMaxWalkMaps];
  float* out[kMaxWalkMaps];
  const float* grad[kMaxWalkMaps];
  int count;
};

bool all_zero(const float* values, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    if (!(values[i] == 0)) return false;
  }
  return true;
}

// The maps of one image that have to be walked, in groups of at most kMaxWalkMaps.
std::vector<Chunk> chunks_of(const std::vector<int64_t>& channels, size_t plane, const float* in, float* out,
                             const float* grad) {
  std::vector<Chunk> chunks;
  const size_t groups = (channels.size() + kMaxWalkMaps - 1) / kMaxWalkMaps;
  for (size_t g = 0; g < groups; ++g) {
    Chunk chunk{{}, {}, {}, 0};
    for (size_t i = channels.size() * g / groups; i < channels.size() * (g + 1) / groups; ++i, ++chunk.count) {
      const size_t at = size_t(channels[i]) * plane;
      chunk.in[chunk.count] = in + at;
      chunk.out[chunk.count] = out ? out + at : nullptr;
      chunk.grad[chunk.count] = grad ? grad + at : nullptr;
    }
    chunks.push_back(chunk);
  }
  return chunks;
}

template <class T>
void walk_chunk(const Walker<T>& walker, const Team& team, const Chunk& chunk, const WalkMethod& method) {
  const int begin = walker.first_row(team), end = walker.last_row(team), maps = chunk.count;
  T *now = walker.state(0), *other = walker.state(1);
  walker.clear_outer_rows(team, 2, maps);
  walker.kernels.pack_maps(walker.plan, chunk.in, maps, now, walker.scratch(team), begin, end);
  team.barrier();
  T* result = now;
  if (method.series.empty()) {
    for (int64_t i = 0; i < method.steps; ++i) {
      walker.step(team, maps, {now, other, 1, 0, nullptr, 0, nullptr, 0});
      std::swap(now, other);
    }
    result = now;
  } else {
    const std::vector<double>& c = method.series;
    T* const sum = result = walker.state(2);
    walker.own_values(team, maps, [&](size_t i) { sum[i] = T(c[0]) * now[i]; });
    for (size_t k = 1; k < c.size(); ++k) {
      const T previous = k == 1 ? 0 : -1;
      walker.step(team, maps,
                  {now, other, T(k == 1 ? 1 : 2), previous, nullptr, 0, c[k] != 0 ? sum : nullptr, T(c[k])});
      std::swap(now, other);
    }
  }
  walker.kernels.unpack_maps(walker.plan, result, maps, chunk.out, walker.scratch(team), begin, end);
  team.barrier();
}

// Reverse mode through the Chebyshev recurrence: b_k = D^-1 dL/dx_k follows the same recurrence downwards (W is
// symmetric, so P^T = D P D^-1), and the states x_k are recovered on the way, since x_{k-1} = 2 P x_k - x_{k+1}.
template <class T>
void walk_chunk_backward(const Walker<T>& walker, const Team& team, const Chunk& chunk, const std::vector<double>& c) {
  const int begin = walker.first_row(team), end = walker.last_row(team), maps = chunk.count, n = int(c.size()) - 1;
  const bool wants_affinity = walker.plan.gradient != nullptr;
  T *g = walker.state(0), *b_next = walker.state(1), *b_after = walker.state(2);
  T *x_high = walker.state(3), *x_low = walker.state(4), *q = walker.state(5);
  walker.clear_outer_rows(team, wants_affinity ? 6 : 3, maps);
  walker.kernels.pack_maps(walker.plan, chunk.grad, maps, g, walker.scratch(team), begin, end);
  walker.kernels.scale_by_degree(walker.plan, g, maps, true, begin, end);
  walker.own_values(team, maps, [&](size_t i) {
    b_next[i] = T(c[n]) * g[i];
    b_after[i] = 0;
  });
  if (wants_affinity) {
    walker.kernels.pack_maps(walker.plan, chunk.in, maps, x_high, walker.scratch(team), begin, end);
    team.barrier();
    for (int k = 1; k <= n; ++k) {
      std::swap(x_high, x_low);  // x_low = x_{k-1}
      walker.step(team, maps, {x_low, x_high, T(k == 1 ? 1 : 2), T(k == 1 ? 0 : -1), nullptr, 0, nullptr, 0});
    }
  }
  team.barrier();
  for (int k = n - 1; k >= 0; --k) {
    if (wants_affinity) {
      walker.step(team, maps, {x_low, q, 1, 0, nullptr, 0, nullptr, 0});
      walker.kernels.outer[maps](walker.plan, b_next, x_low, q, T(k == 0 ? 1 : 2), begin, end);
      walker.own_values(team, maps, [&](size_t i) { x_high[i] = 2 * q[i] - x_high[i]; });
      team.barrier();
      std::swap(x_high, x_low);
    }
    const T* const add = c[k] != 0 ? g : nullptr;
    walker.step(team, maps, {b_next, b_after, T(k == 0 ? 1 : 2), -1, add, T(c[k]), nullptr, 0});
    std::swap(b_next, b_after);
  }
  if (chunk.out[0]) {
    walker.kernels.scale_by_degree(walker.plan, b_next, maps, false, begin, end);
    walker.kernels.unpack_maps(walker.plan, b_next, maps, chunk.out, walker.scratch(team), begin, end);
  }
  team.barrier();
}

// run(walker, team, image) for every image: images side by side where their weights fit a core's own cache, otherwise
// all threads on one image after the other.
template <class T, class Run>
void for_each_image(const WalkShape& shape, const WalkOptions& options, int maps, int states, bool gradient,
                    int threads, Run&& run) {
  threads = usable_threads(threads);
  const bool fits = Walker<T>::weight_bytes(shape, options.radius) <= size_t(1) << 20;
  const bool tiny = double(shape.height) * shape.width * maps * shape.batch < kPixelsPerThread;
  const int64_t side_by_side = threads > 1 && fits && !tiny ? shape.batch / threads * threads : 0;
  if (side_by_side > 0) {
    std::vector<std::unique_ptr<Walker<T>>> walkers;
    for (int i = 0; i < threads; ++i) {
      walkers.push_back(std::make_unique<Walker<T>>(shape, options, maps, states, gradient, 1));
    }
    parallel(threads, [&](const Team& team) {
      for (int64_t b = team.thread; b < side_by_side; b += team.threads) run(*walkers[team.thread], alone(), b);
    });
  }
  if (side_by_side < shape.batch) {
    threads = worthwhile_threads(threads, double(shape.height) * shape.width * maps, kPixelsPerThread);
    threads = int(std::min<int64_t>(threads, shape.height));
    const Walker<T> walker(shape, options, maps, states, gradient, threads);
    parallel(threads, [&](const Team& team) {
      for (int64_t b = side_by_side; b < shape.batch; ++b) run(walker, team, b);
    });
  }
}

using ImageChunks = std::vector<std::vector<Chunk>>;

int largest_chunk(const ImageChunks& images) {
  int maps = 1;
  for (const auto& chunks : images) {
    for (const Chunk& chunk : chunks) maps = std::max(maps, chunk.count);
  }
  return maps;
}

template <class T>
void walk_forward(const float* affinity, const ImageChunks& images, const WalkShape& shape, const WalkOptions& options,
                  const WalkMethod& method, int threads) {
  const size_t image_affinity = size_t(neighbour_count(options.radius)) * shape.height * shape.width;
  for_each_image<T>(shape, options, largest_chunk(images), method.series.empty() ? 2 : 3, false, threads,
                    [&](const Walker<T>& walker, const Team& team, int64_t b) {
                      if (images[b].empty()) return;
                      walker.load_affinity(team, affinity + image_affinity * b, options.beta);
                      for (const Chunk& chunk : images[b]) walk_chunk(walker, team, chunk, method);
                    });
}

template <class T>
void walk_backward(const float* affinity, float* grad_affinity, const ImageChunks& images, const WalkShape& shape,
                   const WalkOptions& options, int threads) {
  const size_t image_affinity = size_t(neighbour_count(options.radius)) * shape.height * shape.width;
  const std::vector<double> series = gradient_series(options);
  for_each_image<T>(shape, options, largest_chunk(images), grad_affinity ? 6 : 3, grad_affinity != nullptr, threads,
                    [&](const Walker<T>& walker, const Team& team, int64_t b) {
                      if (images[b].empty()) return;
                      const float* const image = affinity + image_affinity * b;
                      walker.load_affinity(team, image, options.beta);
                      for (const Chunk& chunk : images[b]) walk_chunk_backward(walker, team, chunk, series);
                      if (grad_affinity) {
                        walker.kernels.unpack_gradient(walker.plan, image, options.beta,
                                                       grad_affinity + image_affinity * b, walker.scratch(team),
                                                       walker.first_row(team), walker.last_row(team));
                        team.barrier();
                      }
                    });
}

}  // namespace

void random_walk_cpu(const float* maps, const float* affinity, float* out, WalkShape shape, const WalkOptions& options,
                     int threads) {
  const size_t plane = size_t(shape.height) * shape.width, count = size_t(shape.batch) * shape.channels * plane;
  if (count == 0) return;
  if (options.steps == 0) {
    std::memcpy(out, maps, count * sizeof(float));
    return;
  }
  expect_writes(out, count * sizeof(float));
  ImageChunks images;
  for (int64_t b = 0; b < shape.batch; ++b) {
    const size_t image = size_t(b) * shape.channels * plane;
    std::vector<int64_t> walked;
    for (int64_t c = 0; c < shape.channels; ++c) {
      if (all_zero(maps + image + c * plane, plane)) {
        std::memset(out + image + c * plane, 0, plane * sizeof(float));
      } else {
        walked.push_back(c);
      }
    }
    images.push_back(chunks_of(walked, plane, maps + image, out + image, nullptr));
  }
  const WalkMethod method = choose_walk_method(options);
  if (method.in_double) {
    walk_forward<double>(affinity, images, shape, options, method, threads);
  } else {
    walk_forward<float>(affinity, images, shape, options, method, threads);
  }
}

void random_walk_backward_cpu(const float* grad, const float* maps, const float* affinity, float* grad_maps,
                              float* grad_affinity, WalkShape shape, const WalkOptions& options, int threads) {
  const size_t plane = size_t(shape.height) * shape.width, count = size_t(shape.batch) * shape.channels * plane;
  const size_t affinity_count = size_t(shape.batch) * neighbour_count(options.radius) * plane;
  if (grad_affinity) {
    expect_writes(grad_affinity, affinity_count * sizeof(float));
    std::memset(grad_affinity, 0, affinity_count * sizeof(float));
  }
  if (count == 0) return;
  if (options.steps == 0) {
    if (grad_maps) std::memcpy(grad_maps, grad, count * sizeof(float));
    return;
  }
  ImageChunks images;
  for (int64_t b = 0; b < shape.batch; ++b) {
    const size_t image = size_t(b) * shape.channels * plane;
    std::vector<int64_t> walked;
    for (int64_t c = 0; c < shape.channels; ++c) {
      if (!all_zero(grad + image + c * plane, plane)) {
        walked.push_back(c);
      } else if (grad_maps) {
        std::memset(grad_maps + image + c * plane, 0, plane * sizeof(float));
      }
    }
    images.push_back(chunks_of(walked, plane, maps + image, grad_maps ? grad_maps + image : nullptr, grad + image));
  }
  if (gradient_in_double(options)) {
    walk_backward<double>(affinity, grad_affinity, images, shape, options, threads);
  } else {
    walk_backward<float>(affinity, grad_affinity, images, shape, options, threads);
  }
}

}  // namespace wsss
