// The half-disc of neighbours every local op shares.
//   offsets (dy, dx) with dy > 0, or dy = 0 and dx > 0, and dx^2 + dy^2 < radius^2, row-major: 34 for radius 5.
// Functions here are static: kernel files compiled for newer processors must not lend theirs to the rest.
#pragma once

#define WSSS_ALWAYS_INLINE inline __attribute__((always_inline))
#ifdef __CUDACC__
#define WSSS_HOST_DEVICE __host__ __device__
#else
#define WSSS_HOST_DEVICE
#endif

namespace wsss {

constexpr int kMaxRadius = 16;

// Largest |dx| of stencil row dy; every row 0 <= dy < radius has one (0 when only dx = 0 fits).
WSSS_HOST_DEVICE static constexpr int stencil_reach(int radius, int dy) {
  int reach = 0;
  while ((reach + 1) * (reach + 1) + dy * dy < radius * radius) ++reach;
  return reach;
}

// Index of offset (dy, dx) in the row-major order.
WSSS_HOST_DEVICE static constexpr int offset_index(int radius, int dy, int dx) {
  if (dy == 0) return dx - 1;
  int index = stencil_reach(radius, 0);
  for (int row = 1; row < dy; ++row) index += 2 * stencil_reach(radius, row) + 1;
  return index + dx + stencil_reach(radius, dy);
}

WSSS_HOST_DEVICE static constexpr int neighbour_count(int radius) {
  return offset_index(radius, radius - 1, stencil_reach(radius, radius - 1)) + 1;
}

constexpr int kMaxNeighbours = neighbour_count(kMaxRadius);

// The offsets written out, for loops that take them as they come.
struct Neighbourhood {
  int radius;
  int count;
  int dy[kMaxNeighbours];
  int dx[kMaxNeighbours];
};

static inline Neighbourhood make_neighbourhood(int radius) {
  Neighbourhood hood{radius, 0, {}, {}};
  for (int dy = 0; dy < radius; ++dy) {
    const int reach = stencil_reach(radius, dy);
    for (int dx = dy == 0 ? 1 : -reach; dx <= reach; ++dx) {
      hood.dy[hood.count] = dy;
      hood.dx[hood.count++] = dx;
    }
  }
  return hood;
}

}  // namespace wsss
