// Memory of one thread, aligned to cache lines, that grows and is reused.

#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace s1::cpu {

class Scratch {
 public:
  // Memory for `count` values; the former content is lost.
  template <typename T = float>
  T* get(int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    if (bytes > size_) {
      memory_.reset(new (std::align_val_t{64}) std::byte[bytes]);
      size_ = bytes;
    }
    return reinterpret_cast<T*>(memory_.get());
  }

 private:
  struct Delete {
    void operator()(std::byte* p) const { ::operator delete[](p, std::align_val_t{64}); }
  };
  std::unique_ptr<std::byte[], Delete> memory_;
  size_t size_ = 0;
};

}  // namespace s1::cpu
