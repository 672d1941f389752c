// Parts of one block of memory that the caller gives. Over a null block it only counts: the same code asks how much is
// needed and then takes it.
#pragma once
#include <cstddef>

namespace wsss {

class Workspace {
 public:
  explicit Workspace(void* block) : block_(static_cast<unsigned char*>(block)) {}

  template <class T>
  T* take(size_t count) {
    unsigned char* const part = block_ ? block_ + bytes_ : nullptr;
    bytes_ += (count * sizeof(T) + 255) / 256 * 256;
    return reinterpret_cast<T*>(part);
  }
  size_t bytes() const { return bytes_; }

 private:
  unsigned char* block_;
  size_t bytes_ = 0;
};

}  // namespace wsss
