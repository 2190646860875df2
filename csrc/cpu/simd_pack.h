// How numbers of a layer's input come into panels and rows of T: read in their own type and converted in registers.
// For the files compiled once per instruction set.
#pragma once

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "kfac/simd.h"
#include "simd_vector.h"

namespace kfac {
namespace KFAC_SIMD {
namespace {

// Numbers in memory that are widened to float.
struct BFloat16 {
  uint16_t bits;
  KFAC_INLINE operator float() const {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    __builtin_memcpy(&value, &wide, sizeof value);
    return value;
  }
};

struct Float16 {
  uint16_t bits;
  // Shift exponent and mantissa into float's place and rescale by 2^112; infinities and NaN get float's exponent.
  KFAC_INLINE operator float() const {
    const uint32_t sign = uint32_t(bits & 0x8000u) << 16, rest = uint32_t(bits & 0x7fffu) << 13;
    float value;
    __builtin_memcpy(&value, &rest, sizeof value);
    value *= 0x1p112f;
    uint32_t out;
    __builtin_memcpy(&out, &value, sizeof out);
    if (rest >= 0x0f800000u) out = rest | 0x7f800000u;
    out |= sign;
    __builtin_memcpy(&value, &out, sizeof value);
    return value;
  }
};

// How many leading sources there are, if they are neighbours in memory; else 0.
template <class S>
int contiguous_lanes(const void* const* sources) {
  int lanes = 0;
  while (lanes < kPanel && sources[lanes] == static_cast<const S*>(sources[0]) + lanes) ++lanes;
  for (int i = lanes; i < kPanel; ++i) {
    if (sources[i]) return 0;
  }
  return sources[0] ? lanes : 0;
}

// The next `kLanes` numbers as a vector of T.
template <class T, class S>
KFAC_INLINE typename Vector<T>::type load_as(const S* from) {
  using V = typename Vector<T>::type;
  if constexpr (__is_same(S, T)) {
    return load(from);
  } else {
    static_assert(__is_same(T, float) && sizeof(S) == 2, "only 16-bit numbers are widened, to float");
#if defined(__AVX512F__)
    if constexpr (__is_same(S, Float16))
      return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
    if constexpr (__is_same(S, Float16))
      return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#endif
    typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
    typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
    const Bits bits = __builtin_convertvector(*reinterpret_cast<const Half*>(from), Bits);
    if constexpr (__is_same(S, BFloat16)) return reinterpret_cast<V>(bits << 16);
    const Bits rest = (bits & 0x7fffu) << 13;  // as Float16 does it
    const Bits value = reinterpret_cast<Bits>(reinterpret_cast<V>(rest) * 0x1p112f);
    const Bits infinite = reinterpret_cast<Bits>(rest >= 0x0f800000u);
    return reinterpret_cast<V>((infinite & (rest | 0x7f800000u)) | (~infinite & value) | (bits & 0x8000u) << 16);
  }
}

// A step of a transposition in registers: exchanges blocks of kDistance lanes.
template <class T, int kDistance>
KFAC_INLINE void butterfly(typename Vector<T>::type* rows) {
  using V = typename Vector<T>::type;
  constexpr int kLanes = Vector<T>::kLanes;
  decltype(V{} < V{}) upper, lower;  // which lanes of (a, b) make up the two new rows; constants once unrolled
  for (int l = 0; l < kLanes; ++l) {
    upper[l] = (l & kDistance) ? kLanes + l - kDistance : l;
    lower[l] = (l & kDistance) ? kLanes + l : l + kDistance;
  }
  for (int i = 0; i < kLanes; ++i) {
    if (i & kDistance) continue;
    const V a = rows[i], b = rows[i + kDistance];
    rows[i] = __builtin_shuffle(a, b, upper);
    rows[i + kDistance] = __builtin_shuffle(a, b, lower);
  }
}

// rows[i][j] <-> rows[j][i]
template <class T>
KFAC_INLINE void transpose(typename Vector<T>::type* rows) {
  constexpr int kLanes = Vector<T>::kLanes;
  if constexpr (kLanes > 8) butterfly<T, 8>(rows);
  if constexpr (kLanes > 4) butterfly<T, 4>(rows);
  if constexpr (kLanes > 2) butterfly<T, 2>(rows);
  butterfly<T, 1>(rows);
}

// Rows r up to r + kLanes of consecutive numbers.
template <class S, class T>
KFAC_INLINE void interleave_block(const void* const* sources, int64_t r, T* target, int64_t target_stride) {
  using V = typename Vector<T>::type;
  constexpr int kLanes = Vector<T>::kLanes;
  for (int first = 0; first < kPanel; first += kLanes) {
    V rows[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const S* source = static_cast<const S*>(sources[first + i]);
      rows[i] = source ? load_as<T>(source + r) : V{};
    }
    transpose<T>(rows);
    for (int i = 0; i < kLanes; ++i) store(target + (r + i) * target_stride + first, rows[i]);
  }
}

template <class S, class T>
KFAC_INLINE void copy_rows(const S* row, int lanes, int64_t count, int64_t stride, T* target, int64_t target_stride) {
  constexpr int kLanes = Vector<T>::kLanes;
  for (int64_t r = 0; r < count; ++r, row += stride, target += target_stride) {
    if (lanes == kPanel) {
      for (int i = 0; i < kPanel; i += kLanes) store(target + i, load_as<T>(row + i));
    } else {
      for (int i = 0; i < kPanel; ++i) target[i] = i < lanes ? T(row[i]) : T(0);
    }
  }
}

template <class S, class T>
void interleave_from(const void* const* sources, int64_t count, int64_t stride, T* target, int64_t target_stride) {
  if (const int lanes = contiguous_lanes<S>(sources)) {
    return copy_rows(static_cast<const S*>(sources[0]), lanes, count, stride, target, target_stride);
  }
  constexpr int kLanes = Vector<T>::kLanes;
  if (stride == 1 && count >= kLanes) {
    for (int64_t r = 0; r + kLanes <= count; r += kLanes) interleave_block<S>(sources, r, target, target_stride);
    if (count % kLanes) interleave_block<S>(sources, count - kLanes, target, target_stride);  // some once more
    return;
  }
  static const S kZero{};
  const S* from[kPanel];
  int64_t step[kPanel];
  for (int i = 0; i < kPanel; ++i) {
    from[i] = sources[i] ? static_cast<const S*>(sources[i]) : &kZero;
    step[i] = sources[i] ? stride : 0;
  }
  for (int64_t r = 0; r < count; ++r) {
    for (int i = 0; i < kPanel; ++i) target[r * target_stride + i] = T(from[i][r * step[i]]);
  }
}

// T is double for kFloat64 alone.
template <class T>
void interleave(const void* const* sources, DType dtype, int64_t count, int64_t stride, T* target,
                int64_t target_stride) {
  if constexpr (__is_same(T, double)) {
    interleave_from<double>(sources, count, stride, target, target_stride);
  } else if (dtype == DType::kFloat32) {
    interleave_from<float>(sources, count, stride, target, target_stride);
  } else if (dtype == DType::kBFloat16) {
    interleave_from<BFloat16>(sources, count, stride, target, target_stride);
  } else {
    interleave_from<Float16>(sources, count, stride, target, target_stride);
  }
}

template <class S, class T>
void convert_from(const void* source, int64_t count, int64_t stride, T* target) {
  const S* from = static_cast<const S*>(source);
  int64_t r = 0;
  if (stride == 1) {
    constexpr int kLanes = Vector<T>::kLanes;
    for (; r + kLanes <= count; r += kLanes) store(target + r, load_as<T>(from + r));
  }
  for (; r < count; ++r) target[r] = T(from[r * stride]);
}

template <class T>
void convert(const void* source, DType dtype, int64_t count, int64_t stride, T* target) {
  if constexpr (__is_same(T, double)) {
    convert_from<double>(source, count, stride, target);
  } else if (dtype == DType::kFloat32) {
    convert_from<float>(source, count, stride, target);
  } else if (dtype == DType::kBFloat16) {
    convert_from<BFloat16>(source, count, stride, target);
  } else {
    convert_from<Float16>(source, count, stride, target);
  }
}

}  // namespace
}  // namespace KFAC_SIMD
}  // namespace kfac
