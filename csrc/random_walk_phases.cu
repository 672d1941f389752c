// A walk of any radius and size, in float or double, forward and backward, with everything in device memory. It
// consists of phases that only need all threads to meet between them: one cooperative launch runs them all, or one
// launch each.
#include "random_walk_phases.h"

#include <cooperative_groups.h>

#include <algorithm>

#include "common/cuda_launch.h"
#include "common/neighbourhood.h"
#include "common/workspace.h"
#include "random_walk_device.cuh"

namespace wsss {
namespace {

constexpr int kThreads = 256;
constexpr int kMaps = 4;  // walked side by side by one thread, so that a weight is read once for all of them

struct Wanted {
  bool backward, grad_affinity;
};

template <class T>
struct Walk {
  const float *maps, *affinity;
  const float* grad;     // backward only, as what follows
  float* grad_affinity;  // or null
  float* out;            // forward: the walked maps; backward: their gradient, or null
  T *weights, *inverse;  // [B, K, H, W] affinity^beta;  [B, H, W] 1 / degree
  T* grad_weights;       // [B, K, H, W]
  T *x[2], *b[2];        // [B, C, H, W] each: the states x_k (backward also b_k) of k even and k odd
  T* sum;                // forward: of the series; backward: P x_k
  T* series;             // [products + 1]
  int* alive;            // [B, C] whether the map (backward: its gradient) has anything but zeros
  int64_t batch, plane, steps, products;
  double beta, first;  // first: coefficient of T_0 or T_1
  int channels, groups, height, width, radius, count;
  bool by_series;

  __device__ int64_t map_at(int64_t image, int channel) const { return (image * channels + channel) * plane; }
};

// body(image, group of maps, pixel): a thread each; `groups` of them an image.
template <class T, class Body>
__device__ void for_each_pixel(const Walk<T>& w, int groups, Body body) {
  const int64_t tiles = (w.plane + kThreads - 1) / kThreads;
  for (int64_t block = blockIdx.x; block < w.batch * groups * tiles; block += gridDim.x) {
    const int64_t tile = block % tiles, item = block / tiles;
    const int64_t pixel = tile * kThreads + threadIdx.x;
    if (pixel < w.plane) body(item / groups, int(item % groups), pixel);
  }
}

// body(k, step, forward): the links of a pixel that stay in the map; step leads to the other end, at which the link is
// stored where it is not forward.
template <class T, class Body>
__device__ void for_each_link(const Walk<T>& w, int64_t pixel, Body body) {
  const int y = int(pixel / w.width), x = int(pixel % w.width);
  int k = 0;
  for (int dy = 0; dy < w.radius; ++dy) {
    const int reach = stencil_reach(w.radius, dy);
    for (int dx = dy == 0 ? 1 : -reach; dx <= reach; ++dx, ++k) {
      const int64_t step = int64_t(dy) * w.width + dx;
      if (y + dy < w.height && x + dx >= 0 && x + dx < w.width) body(k, step, true);
      if (y - dy >= 0 && x - dx >= 0 && x - dx < w.width) body(k, -step, false);
    }
  }
}

template <class T>
__device__ int64_t link_at(const Walk<T>& w, int64_t image, int k, int64_t pixel, int64_t step, bool forward) {
  return (image * w.count + k) * w.plane + pixel + (forward ? 0 : step);
}

// Which of the group's maps are walked, a bit each.
template <class T>
__device__ int walked_maps(const Walk<T>& w, int64_t image, int group) {
  int walked = 0;
  for (int m = 0; m < kMaps; ++m) {
    const int channel = group * kMaps + m;
    if (channel < w.channels && w.alive[image * w.channels + channel]) walked |= 1 << m;
  }
  return walked;
}

template <class T>
__device__ void prepare(const Walk<T>& w, const float* source) {
  for (int64_t map = blockIdx.x; map < w.batch * w.channels; map += gridDim.x) {
    bool any = false;
    for (int64_t i = threadIdx.x; i < w.plane && !any; i += kThreads) any = !(source[map * w.plane + i] == 0);
    const int alive = __syncthreads_or(any);
    if (threadIdx.x == 0) w.alive[map] = alive;
  }
  const int64_t links = w.batch * w.count * w.plane, stride = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < links; i += stride) {
    w.weights[i] = link_weight(T(w.affinity[i]), T(w.beta));
    if (w.grad_affinity) w.grad_weights[i] = 0;
  }
  if (w.by_series && blockIdx.x == gridDim.x - 1 && threadIdx.x == kThreads - 1) {
    write_series(w.series, w.first, w.steps, w.products);
  }
}

template <class T>
__device__ void invert_degree(const Walk<T>& w, int64_t image, int64_t pixel) {
  double degree = 1;
  for_each_link(w, pixel, [&](int k, int64_t step, bool forward) {
    degree += double(w.weights[link_at(w, image, k, pixel, step, forward)]);
  });
  w.inverse[image * w.plane + pixel] = T(1 / degree);
}

// (P x)_i of the walked maps of a group: product[m] = x_i + sum_j W_ij (x_j - x_i) / d_i. x is the group's first map.
template <class T>
__device__ void multiply(const Walk<T>& w, const T* x, int64_t image, int64_t pixel, int walked, T (&product)[kMaps]) {
  T centre[kMaps], change[kMaps] = {};
#pragma unroll
  for (int m = 0; m < kMaps; ++m) centre[m] = walked >> m & 1 ? x[m * w.plane + pixel] : T(0);
  for_each_link(w, pixel, [&](int k, int64_t step, bool forward) {
    const T weight = w.weights[link_at(w, image, k, pixel, step, forward)];
#pragma unroll
    for (int m = 0; m < kMaps; ++m) {
      if (walked >> m & 1) change[m] += weight * (x[m * w.plane + pixel + step] - centre[m]);
    }
  });
  const T inverse = w.inverse[image * w.plane + pixel];
#pragma unroll
  for (int m = 0; m < kMaps; ++m) product[m] = centre[m] + inverse * change[m];
}

// Phases: 0 weights, 1 degrees and the first state, then one a product.
template <class T>
__device__ void forward_phase(const Walk<T>& w, int64_t phase) {
  if (phase == 0) return prepare(w, w.maps);
  if (phase == 1) {
    for_each_pixel(w, 1, [&](int64_t image, int, int64_t pixel) {
      invert_degree(w, image, pixel);
      for (int c = 0; c < w.channels; ++c) {
        const int64_t at = w.map_at(image, c) + pixel;
        w.x[0][at] = T(w.maps[at]);
        if (w.by_series) w.sum[at] = w.series[0] * T(w.maps[at]);
      }
    });
    return;
  }
  const int64_t k = phase - 1;
  const T* const now = w.x[(k - 1) & 1];
  T* const next = w.x[k & 1];  // holds x_{k-2}
  for_each_pixel(w, w.groups, [&](int64_t image, int group, int64_t pixel) {
    const int walked = walked_maps(w, image, group);
    const int64_t base = w.map_at(image, group * kMaps);
    T product[kMaps];
    if (walked) multiply(w, now + base, image, pixel, walked, product);
    for (int m = 0; m < kMaps && group * kMaps + m < w.channels; ++m) {
      const int64_t at = base + m * w.plane + pixel;
      T result = 0;
      if (walked >> m & 1) {
        T value = product[m];
        if (w.by_series && k > 1) value = 2 * value - next[at];
        next[at] = result = value;
        if (w.by_series) w.sum[at] = result = w.sum[at] + w.series[k] * value;
      }
      if (k == w.products) w.out[at] = float(result);
    }
  });
}

// Reverse mode through the Chebyshev recurrence: b_k = D^-1 dL/dx_k follows it downwards (W is symmetric, so P^T =
// D P D^-1), and the states are recovered on the way, since x_{k-1} = 2 P x_k - x_{k+1}.
template <class T>
__device__ void backward_start(const Walk<T>& w) {
  for_each_pixel(w, 1, [&](int64_t image, int, int64_t pixel) {
    invert_degree(w, image, pixel);
    const T inverse = w.inverse[image * w.plane + pixel];
    for (int c = 0; c < w.channels; ++c) {
      const int64_t at = w.map_at(image, c) + pixel;
      w.b[w.products & 1][at] = w.series[w.products] * inverse * T(w.grad[at]);
      w.b[(w.products + 1) & 1][at] = 0;
      if (w.grad_affinity) w.x[0][at] = T(w.maps[at]);
    }
  });
}

// x_k from x_{k-1} and x_{k-2}.
template <class T>
__device__ void next_state(const Walk<T>& w, int64_t k) {
  const T* const now = w.x[(k - 1) & 1];
  T* const next = w.x[k & 1];
  for_each_pixel(w, w.groups, [&](int64_t image, int group, int64_t pixel) {
    const int walked = walked_maps(w, image, group);
    if (!walked) return;
    const int64_t base = w.map_at(image, group * kMaps);
    T product[kMaps];
    multiply(w, now + base, image, pixel, walked, product);
    for (int m = 0; m < kMaps; ++m) {
      const int64_t at = base + m * w.plane + pixel;
      if (walked >> m & 1) next[at] = k > 1 ? 2 * product[m] - next[at] : product[m];
    }
  });
}

// b_k = 2 P b_{k+1} - b_{k+2} + c_k D^-1 g (a single P for k = 0), and q = P x_k into `sum`.
template <class T>
__device__ void clenshaw_step(const Walk<T>& w, int64_t k) {
  const T* const after = w.b[(k + 1) & 1];
  T* const now = w.b[k & 1];  // holds b_{k+2}
  for_each_pixel(w, w.groups, [&](int64_t image, int group, int64_t pixel) {
    const int walked = walked_maps(w, image, group);
    if (!walked) return;
    const int64_t base = w.map_at(image, group * kMaps);
    const T inverse = w.inverse[image * w.plane + pixel];
    T product[kMaps];
    multiply(w, after + base, image, pixel, walked, product);
    for (int m = 0; m < kMaps; ++m) {
      const int64_t at = base + m * w.plane + pixel;
      if (!(walked >> m & 1)) continue;
      now[at] = (k == 0 ? 1 : 2) * product[m] - now[at] + w.series[k] * inverse * T(w.grad[at]);
    }
    if (!w.grad_affinity) return;
    multiply(w, w.x[k & 1] + base, image, pixel, walked, product);
    for (int m = 0; m < kMaps; ++m) {
      if (walked >> m & 1) w.sum[base + m * w.plane + pixel] = product[m];
    }
  });
}

// What the product x_{k+1} = 2 P x_k - x_{k-1} adds to the gradient of the weights; then x_{k-1} takes x_{k+1}'s place.
template <class T>
__device__ void gather_gradient(const Walk<T>& w, int64_t k) {
  const T *const b = w.b[(k + 1) & 1], *const x = w.x[k & 1], *const q = w.sum;
  T* const other = w.x[(k + 1) & 1];
  const T scale = k == 0 ? 1 : 2;
  for_each_pixel(w, 1, [&](int64_t image, int, int64_t pixel) {
    for (int group = 0; group < w.groups; ++group) {
      const int walked = walked_maps(w, image, group);
      if (!walked) continue;
      const int64_t base = w.map_at(image, group * kMaps) + pixel;
      T bi[kMaps], xi[kMaps], qi[kMaps];
#pragma unroll
      for (int m = 0; m < kMaps; ++m) {
        if (!(walked >> m & 1)) continue;
        const int64_t at = base + m * w.plane;
        bi[m] = b[at], xi[m] = x[at], qi[m] = q[at];
        other[at] = 2 * qi[m] - other[at];
      }
      for_each_link(w, pixel, [&](int k_link, int64_t step, bool forward) {
        if (!forward) return;
        T gradient = 0;
#pragma unroll
        for (int m = 0; m < kMaps; ++m) {
          if (!(walked >> m & 1)) continue;
          const int64_t there = base + m * w.plane + step;
          gradient += bi[m] * (x[there] - qi[m]) + b[there] * (xi[m] - q[there]);
        }
        w.grad_weights[link_at(w, image, k_link, pixel, step, true)] += scale * gradient;
      });
    }
  });
}

template <class T>
__device__ void write_gradients(const Walk<T>& w) {
  for_each_pixel(w, 1, [&](int64_t image, int, int64_t pixel) {
    if (w.out) {
      const T degree = 1 / w.inverse[image * w.plane + pixel];
      for (int c = 0; c < w.channels; ++c) {
        const int64_t at = w.map_at(image, c) + pixel;
        w.out[at] = w.alive[image * w.channels + c] ? float(degree * w.b[0][at]) : 0.0f;
      }
    }
    if (!w.grad_affinity) return;
    for (int k = 0; k < w.count; ++k) {
      const int64_t at = link_at(w, image, k, pixel, 0, true);
      const T slope = link_weight(T(w.affinity[at]), T(w.beta - 1)) * T(w.beta);
      w.grad_affinity[at] = w.grad_weights[at] == 0 ? 0.0f : float(w.grad_weights[at] * slope);
    }
  });
}

// Phases: 0 weights, 1 degrees and b_n, where the affinity's gradient is wanted n products up to x_n, then from k = n -
// 1 down to 0 one for b_k (and with that gradient one more), and the end.
template <class T>
__device__ void backward_phase(const Walk<T>& w, int64_t phase) {
  if (phase == 0) return prepare(w, w.grad);
  if (phase == 1) return backward_start(w);
  phase -= 2;
  const int64_t up = w.grad_affinity ? w.products : 0, each = w.grad_affinity ? 2 : 1;
  if (phase < up) return next_state(w, phase + 1);
  phase -= up;
  if (phase == w.products * each) return write_gradients(w);
  const int64_t k = w.products - 1 - phase / each;
  if (phase % each == 0) {
    clenshaw_step(w, k);
  } else {
    gather_gradient(w, k);
  }
}

template <class T, bool kBackward>
__global__ void __launch_bounds__(kThreads, 2) walk_phases(const Walk<T> walk, int64_t first, int64_t last) {
  for (int64_t phase = first; phase <= last; ++phase) {
    if (phase > first) cooperative_groups::this_grid().sync();
    if (kBackward) {
      backward_phase(walk, phase);
    } else {
      forward_phase(walk, phase);
    }
  }
}

template <class T, bool kBackward>
void launch_phases(const Walk<T>& walk, int64_t phases, cudaStream_t stream) {
  const int64_t tiles = (walk.plane + kThreads - 1) / kThreads;
  const int64_t wanted = std::max<int64_t>(walk.batch * walk.groups * tiles, 1);
  const auto kernel = &walk_phases<T, kBackward>;
  int resident = 0;
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, 0), "walk_phases");
  const int64_t at_once = int64_t(resident) * cuda_attribute(cudaDevAttrMultiProcessorCount);
  Launch how{dim3(1), dim3(kThreads), 0, stream};
  // A map that fills the machine several times over hides a launch behind its own work.
  if (cuda_attribute(cudaDevAttrCooperativeLaunch) && at_once > 0 && wanted <= 4 * at_once) {
    how.grid.x = unsigned(std::min(wanted, at_once));
    how.cooperative = true;
    launch("walk_phases", how, kernel, walk, int64_t(0), phases - 1);
    return;
  }
  how.grid.x = unsigned(std::min<int64_t>(wanted, INT32_MAX));
  for (int64_t phase = 0; phase < phases; ++phase) launch("walk_phases", how, kernel, walk, phase, phase);
}

template <class T>
Walk<T> make_walk(const WalkShape& shape, const WalkOptions& options, const std::vector<double>& series,
                  const Wanted& wanted, Workspace& workspace) {
  Walk<T> walk = {};
  walk.batch = shape.batch;
  walk.channels = int(shape.channels);
  walk.groups = int((shape.channels + kMaps - 1) / kMaps);
  walk.height = int(shape.height);
  walk.width = int(shape.width);
  walk.plane = shape.height * shape.width;
  walk.radius = options.radius;
  walk.count = neighbour_count(options.radius);
  walk.beta = std::min(options.beta, 3e38);  // an infinite power of 1 would be NaN
  walk.steps = options.steps;
  walk.by_series = !series.empty();
  walk.products = walk.by_series ? int64_t(series.size()) - 1 : options.steps;
  walk.first = walk.by_series ? series[options.steps % 2] : 0;
  const size_t links = size_t(walk.batch) * walk.count * walk.plane, pixels = size_t(walk.batch) * walk.plane;
  walk.weights = workspace.take<T>(links);
  walk.inverse = workspace.take<T>(pixels);
  walk.series = workspace.take<T>(series.size());
  walk.alive = workspace.take<int>(size_t(walk.batch) * walk.channels);
  const size_t state = pixels * walk.channels;
  if (!wanted.backward || wanted.grad_affinity) {
    walk.x[0] = workspace.take<T>(state);
    walk.x[1] = workspace.take<T>(state);
    if (walk.by_series) walk.sum = workspace.take<T>(state);
  }
  if (wanted.backward) {
    walk.b[0] = workspace.take<T>(state);
    walk.b[1] = workspace.take<T>(state);
    if (wanted.grad_affinity) walk.grad_weights = workspace.take<T>(links);
  }
  return walk;
}

template <class T>
size_t workspace_bytes(const WalkShape& shape, const WalkOptions& options, const std::vector<double>& series,
                       const Wanted& wanted) {
  Workspace counting(nullptr);
  make_walk<T>(shape, options, series, wanted, counting);
  return counting.bytes();
}

template <class T>
void walk_forward(const float* maps, const float* affinity, float* out, const WalkShape& shape,
                  const WalkOptions& options, const WalkMethod& method, void* workspace, cudaStream_t stream) {
  Workspace parts(workspace);
  Walk<T> walk = make_walk<T>(shape, options, method.series, {}, parts);
  walk.maps = maps;
  walk.affinity = affinity;
  walk.out = out;
  launch_phases<T, false>(walk, 2 + walk.products, stream);
}

template <class T>
void walk_backward(const float* grad, const float* maps, const float* affinity, float* grad_maps, float* grad_affinity,
                   const WalkShape& shape, const WalkOptions& options, void* workspace, cudaStream_t stream) {
  Workspace parts(workspace);
  Walk<T> walk = make_walk<T>(shape, options, gradient_series(options), {true, grad_affinity != nullptr}, parts);
  walk.maps = maps;
  walk.affinity = affinity;
  walk.grad = grad;
  walk.out = grad_maps;
  walk.grad_affinity = grad_affinity;
  launch_phases<T, true>(walk, 3 + walk.products * (grad_affinity ? 3 : 1), stream);
}

}  // namespace

size_t phased_walk_workspace(const WalkShape& shape, const WalkOptions& options, const WalkMethod& method) {
  return method.in_double ? workspace_bytes<double>(shape, options, method.series, {})
                          : workspace_bytes<float>(shape, options, method.series, {});
}

void phased_walk(const float* maps, const float* affinity, float* out, const WalkShape& shape,
                 const WalkOptions& options, const WalkMethod& method, void* workspace, cudaStream_t stream) {
  const auto walk = method.in_double ? walk_forward<double> : walk_forward<float>;
  walk(maps, affinity, out, shape, options, method, workspace, stream);
}

size_t phased_walk_backward_workspace(const WalkShape& shape, const WalkOptions& options, bool wants_affinity) {
  const std::vector<double> series = gradient_series(options);
  const auto bytes = gradient_in_double(options) ? workspace_bytes<double> : workspace_bytes<float>;
  return bytes(shape, options, series, {true, wants_affinity});
}

void phased_walk_backward(const float* grad, const float* maps, const float* affinity, float* grad_maps,
                          float* grad_affinity, const WalkShape& shape, const WalkOptions& options, void* workspace,
                          cudaStream_t stream) {
  const auto walk = gradient_in_double(options) ? walk_backward<double> : walk_backward<float>;
  walk(grad, maps, affinity, grad_maps, grad_affinity, shape, options, workspace, stream);
}

}  // namespace wsss
