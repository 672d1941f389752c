// Cache-line aligned workspace, freed with its owner.
#pragma once
#include <cstddef>
#include <memory>
#include <new>

namespace wsss {

template <class T>
class Buffer {
 public:
  explicit Buffer(size_t count) : data_(static_cast<T*>(::operator new(count * sizeof(T) + 1, std::align_val_t(64)))) {}
  T* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<T, Free> data_;
};

}  // namespace wsss
