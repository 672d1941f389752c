// How many images of a batch go through the GPU side by side.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>

namespace wsss {

constexpr size_t kWorkspaceWished = size_t(2) << 30;

// bytes(images): what so many of them need. All, or half of them and so on until they fit.
template <class Bytes>
int64_t images_within(int64_t batch, size_t limit, Bytes bytes) {
  int64_t images = batch;
  while (images > 1 && bytes(images) > limit) images = (images + 1) / 2;
  return images;
}

template <class Bytes>
size_t workspace_for_images(int64_t batch, Bytes bytes) {
  return bytes(images_within(batch, kWorkspaceWished, bytes));
}

// body(first image, how many) over the batch.
template <class Bytes, class Body>
void for_each_group(int64_t batch, size_t workspace, Bytes bytes, Body body) {
  const int64_t at_once = images_within(batch, workspace, bytes);
  if (bytes(at_once) > workspace) throw std::invalid_argument("the workspace has no room for an image");
  for (int64_t first = 0; first < batch; first += at_once) body(first, std::min(at_once, batch - first));
}

}  // namespace wsss
