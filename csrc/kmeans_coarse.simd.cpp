#include "common/simd.h"
#include "kmeans_coarse_kernels.h"

namespace wsss {
namespace WSSS_ISA {

extern const KMeansCoarseKernels kmeans_coarse_kernels;

#if defined(__AVX512BW__)

namespace {

constexpr int n = kLanes<float>;
constexpr int kChunk = 4 * n;  // values of a packed vector that lie side by side: bytes that fill a vector
static_assert(kBytePadding % kChunk == 0);
using V = Vec<float>;
using Whole = Vec<int32_t>;
typedef uint8_t Bytes __attribute__((vector_size(n)));
typedef int8_t Steps __attribute__((vector_size(n)));

// sum += bytes . steps over each four of them; AVX-512 VNNI, which this instruction set's flags do not imply.
WSSS_ALWAYS_INLINE void add_fours(Whole* sum, Vec<uint8_t> bytes, Vec<int8_t> steps) {
  asm("vpdpbusd %2, %1, %0" : "+v"(*sum) : "v"(bytes), "v"(steps));
}
V larger(V a, V b) { return a > b ? a : b; }
float largest(V v) {
  float most = v[0];
  for (int i = 1; i < n; ++i) most = v[i] > most ? v[i] : most;
  return most;
}
// From a range to the whole numbers 0..count and back; where the reciprocal could overflow all of them are 0.
struct Scale {
  float to, from;
};
Scale scale_of(float range, float count) {
  return range > 1e-30f ? Scale{count / range, range / count} : Scale{0.0f, 0.0f};
}

float to_bytes(const float* from, int64_t count, uint8_t* bytes, float* low, float* step) {
  V most = load(from), opposite = -most;
  for (int64_t d = n; d < count; d += n) {
    most = larger(load(from + d), most);
    opposite = larger(-load(from + d), opposite);
  }
  const float first = -largest(opposite), range = largest(most) - first;
  const Scale scale = scale_of(range, 255);
  V rest{};
  for (int64_t d = 0; d < count; d += n) {
    const V above = load(from + d) - splat(first);
    const Whole whole = __builtin_convertvector(above * splat(scale.to) + splat(0.5f), Whole);
    const Bytes narrow = __builtin_convertvector(whole, Bytes);
    std::memcpy(bytes + d, &narrow, sizeof narrow);
    const V left = above - __builtin_convertvector(whole, V) * splat(scale.from);
    rest += left * left;
  }
  for (int64_t d = count; d % kBytePadding != 0; ++d) bytes[d] = 0;
  *low = first;
  *step = scale.from;
  return sum_of_lanes<float>(rest);
}

float round_move(const float* to, const float* from, int64_t count, int64_t j, int64_t vectors, int8_t* packed,
                 float* sum, float* length, float* rest) {
  V most{};
  for (int64_t d = 0; d < count; d += n) {
    const V move = load(to + d) - load(from + d);
    most = larger(larger(move, -move), most);
  }
  const Scale scale = scale_of(largest(most), 127);
  const auto part = [&](int64_t d) { return packed + (d / kChunk * vectors + j) * kChunk + d % kChunk; };
  V squares{}, left{}, wholes{};
  for (int64_t d = 0; d < count; d += n) {
    const V move = load(to + d) - load(from + d), scaled = move * splat(scale.to);
    const Whole whole = __builtin_convertvector(scaled + (scaled < V{} ? splat(-0.5f) : splat(0.5f)), Whole);
    const Steps narrow = __builtin_convertvector(whole, Steps);
    std::memcpy(part(d), &narrow, sizeof narrow);
    const V rounded = __builtin_convertvector(whole, V), over = move - rounded * splat(scale.from);
    wholes += rounded;
    squares += move * move;
    left += over * over;
  }
  for (int64_t d = count; d % kBytePadding != 0; ++d) *part(d) = 0;
  *sum = sum_of_lanes<float>(wholes);
  *length = sum_of_lanes<float>(squares);
  *rest = sum_of_lanes<float>(left);
  return scale.from;
}

template <int R, int C>
WSSS_ALWAYS_INLINE void byte_tile(const uint8_t* const* rows, const uint8_t* const* next, const int8_t* packed,
                                  int64_t vectors, int64_t depth, int32_t* out) {
  Whole sum[R * C];
  unroll<0, R * C>([&](auto i) __attribute__((always_inline)) { sum[i] = Whole{}; });
  for (int64_t d = 0; d < depth; d += kChunk, packed += kChunk * vectors) {
    unroll<0, R>([&](auto i) __attribute__((always_inline)) { fetch(next[i] + d); });
    Vec<uint8_t> value[R];
    unroll<0, R>([&](auto i) __attribute__((always_inline)) { value[i] = load(rows[i] + d); });
    unroll<0, C>([&](auto j) __attribute__((always_inline)) {
      const Vec<int8_t> other = load(packed + j * kChunk);
      unroll<0, R>([&](auto i) __attribute__((always_inline)) { add_fours(&sum[i * C + j], value[i], other); });
    });
  }
  unroll<0, R>([&](auto i) __attribute__((always_inline)) {
    unroll<0, C>([&](auto j)
                     __attribute__((always_inline)) { out[i * vectors + j] = sum_of_lanes<int32_t>(sum[i * C + j]); });
  });
}

template <int R>
void byte_tiles(const uint8_t* const* rows, const uint8_t* const* next, const int8_t* packed, int64_t vectors,
                int64_t depth, int32_t* out) {
  constexpr int C = 5;
  int64_t j = 0;
  for (; j + C <= vectors; j += C) byte_tile<R, C>(rows, next, packed + j * kChunk, vectors, depth, out + j);
  unroll<1, C>([&](auto left) __attribute__((always_inline)) {
    if (left == vectors - j) byte_tile<R, left>(rows, next, packed + j * kChunk, vectors, depth, out + j);
  });
}

void byte_products(const uint8_t* const* rows, const uint8_t* const* next, int count, const int8_t* packed,
                   int64_t vectors, int64_t depth, int32_t* out) {
  constexpr int R = 4;
  for (int i = 0; i < count; ++i) open_pages(next[i], depth);
  int i = 0;
  for (; i + R <= count; i += R) byte_tiles<R>(rows + i, next + i, packed, vectors, depth, out + i * vectors);
  for (; i < count; ++i) byte_tiles<1>(rows + i, next + i, packed, vectors, depth, out + i * vectors);
}

bool available() { return __builtin_cpu_supports("avx512vnni"); }

}  // namespace

constexpr KMeansCoarseKernels kmeans_coarse_kernels = {available, to_bytes, round_move, byte_products};

#else

constexpr KMeansCoarseKernels kmeans_coarse_kernels = {[] { return false; }, nullptr, nullptr, nullptr};

#endif

}  // namespace WSSS_ISA
}  // namespace wsss
