// What the files compiled once per instruction set share: the vector type and how many of them fit the registers.
// Everything is in an unnamed namespace: no symbol of one instruction set can stand in for another's.
#pragma once

#include "kfac/types.h"

namespace kfac {
namespace KFAC_SIMD {
namespace {

#define KFAC_INLINE inline __attribute__((always_inline))
#define KFAC_STRING_(x) #x
#define KFAC_STRING(x) KFAC_STRING_(x)

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Independent sums that keep the multiply-add units busy, and still fit 16 registers beside the operands.
constexpr int kSums = 8;

template <class T>
struct Vector {
  typedef T type __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
  static constexpr int kLanes = kVectorBytes / int(sizeof(T));
};

template <class T>
KFAC_INLINE typename Vector<T>::type load(const T* from) {
  return *reinterpret_cast<const typename Vector<T>::type*>(from);
}

template <class T>
KFAC_INLINE void store(T* to, typename Vector<T>::type value) {
  *reinterpret_cast<typename Vector<T>::type*>(to) = value;
}

// Keeps the compiler from loading `value` again at each of its uses.
template <class V>
KFAC_INLINE void in_register(V& value) {
#if defined(__x86_64__)
  asm("" : "+v"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#else
  (void)value;
#endif
}

// Sum of the lanes, halving.
template <class T, int bytes = kVectorBytes>
KFAC_INLINE T lane_sum(const T* lanes) {
  if constexpr (bytes == sizeof(T)) {
    return *lanes;
  } else {
    constexpr int kHalf = bytes / 2;
    typedef T Half __attribute__((vector_size(kHalf), aligned(alignof(T)), may_alias));
    const Half* halves = reinterpret_cast<const Half*>(lanes);
    const Half sum = halves[0] + halves[1];
    return lane_sum<T, kHalf>(reinterpret_cast<const T*>(&sum));
  }
}

}  // namespace
}  // namespace KFAC_SIMD
}  // namespace kfac
