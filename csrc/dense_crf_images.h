// How many images of a batch go through the GPU side by side.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>

#include "dense_crf.h"
#include "permutohedral_kernels.h"

namespace wsss {

constexpr size_t kWorkspaceWished = size_t(2) << 30;

// bytes(images): what so many of them need. All, or half of them and so on until they fit: into the limit, and into the
// 31 bits that number the vertices of their pixels.
template <class Bytes>
int64_t images_within(const CrfShape& shape, size_t limit, Bytes bytes) {
  const int64_t vertices = shape.height * shape.width * kMaxLatticeVertices;
  int64_t images = shape.batch;
  while (images > 1 && (images * vertices >= int64_t(1) << 31 || bytes(images) > limit)) images = (images + 1) / 2;
  return images;
}

template <class Bytes>
size_t workspace_for_images(const CrfShape& shape, Bytes bytes) {
  return bytes(images_within(shape, kWorkspaceWished, bytes));
}

// body(first image, how many) over the batch.
template <class Bytes, class Body>
void for_each_group(const CrfShape& shape, size_t workspace, Bytes bytes, Body body) {
  const int64_t at_once = images_within(shape, workspace, bytes);
  if (bytes(at_once) > workspace) throw std::invalid_argument("the workspace has no room for an image");
  for (int64_t first = 0; first < shape.batch; first += at_once) body(first, std::min(at_once, shape.batch - first));
}

inline bool empty(const CrfShape& shape) { return shape.batch * shape.labels * shape.height * shape.width == 0; }

}  // namespace wsss
