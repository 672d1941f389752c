// Cache-line aligned workspace, freed with its owner, and how large memory is asked for.
#pragma once
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace wsss {

// For memory about to be written for the first time: a system that hands it out 4 kB at a time takes as long over that
// as a kernel over its arithmetic.
inline void expect_writes(void* begin, size_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kHuge = uintptr_t(2) << 20;
  const uintptr_t from = (uintptr_t(begin) + kHuge - 1) / kHuge * kHuge,
                  to = (uintptr_t(begin) + bytes) / kHuge * kHuge;
  if (to >= from + 8 * kHuge) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#else
  (void)begin, (void)bytes;
#endif
}

template <class T>
class Buffer {
 public:
  explicit Buffer(size_t count) : data_(static_cast<T*>(::operator new(count * sizeof(T) + 1, std::align_val_t(64)))) {
    expect_writes(get(), count * sizeof(T));
  }
  T* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<T, Free> data_;
};

}  // namespace wsss
