#pragma once

#include <cstddef>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

namespace kfac {

// Memory for vector loads: none of them straddles two cache lines.
template <class T>
struct CacheLineAllocator {
  using value_type = T;
  static constexpr std::align_val_t kAlignment{64};

  CacheLineAllocator() = default;
  template <class U>
  CacheLineAllocator(const CacheLineAllocator<U>&) {}

  T* allocate(size_t count) {
    void* const memory = ::operator new(count * sizeof(T), kAlignment);
#ifdef KFAC_POISON  // what is read before it is written shows as NaN
    std::memset(memory, 0xff, count * sizeof(T));
#endif
    return static_cast<T*>(memory);
  }
  void deallocate(T* memory, size_t) { ::operator delete(memory, kAlignment); }
  // Elements of a Buffer(n) are not set: what is written at once need not be cleared first.
  template <class U>
  void construct(U* element) {
    ::new (static_cast<void*>(element)) U;
  }
  template <class U, class... Args>
  void construct(U* element, Args&&... args) {
    ::new (static_cast<void*>(element)) U(std::forward<Args>(args)...);
  }
  template <class U>
  bool operator==(const CacheLineAllocator<U>&) const {
    return true;
  }
  template <class U>
  bool operator!=(const CacheLineAllocator<U>&) const {
    return false;
  }
};

template <class T>
using Buffer = std::vector<T, CacheLineAllocator<T>>;

}  // namespace kfac
