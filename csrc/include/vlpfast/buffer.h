// Scratch memory for kernels.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace vlpfast {

// Scratch memory of one thread, on cache lines and uninitialised.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<T*>(::operator new(sizeof(T) * size, std::align_val_t{64}))) {}
  operator T*() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* data) const { ::operator delete(data, std::align_val_t{64}); }
  };
  std::unique_ptr<T, Free> data_;
};

}  // namespace vlpfast
