// Inner loops, compiled once per instruction set with KFAC_SIMD naming the namespace.
// Nothing here may instantiate a template or inline function of another file: the linker could pick this file's copy,
// with instructions the processor lacks, for everyone.
#include "kfac/simd.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace kfac {
namespace KFAC_SIMD {
namespace {

#define KFAC_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kAccumulators = 16;  // of 32 registers
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kAccumulators = 8;  // of 16 registers
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kAccumulators = 16;  // of 32 registers
#else
constexpr int kVectorBytes = 16, kAccumulators = 8;  // of 16 registers
#endif

template <class T>
struct Vector {
  typedef T type __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
  static constexpr int kLanes = kVectorBytes / int(sizeof(T));
  static constexpr int kPerPanel = kPanel / kLanes;
};

// Rows summed in registers before they are added to memory: long float sums drift, pairwise ones do not.
constexpr int64_t kFlushRows = 64;

// tile[0..R)[0..kPanel) += sum over `runs` of a[r][0..R) b[r][0..kPanel)
template <class T, int R>
KFAC_INLINE void gram_rows(const Runs& runs, const T* a, const T* b, T* tile) {
  using V = typename Vector<T>::type;
  constexpr int kVectors = Vector<T>::kPerPanel, kLanes = Vector<T>::kLanes;
  V sum[R][kVectors] = {};
  int64_t summed = 0;
  auto flush = [&]() {
    for (int i = 0; i < R; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        V* target = reinterpret_cast<V*>(tile + i * kPanel + v * kLanes);
        *target += sum[i][v];
        sum[i][v] = V{};
      }
    }
    summed = 0;
  };
  for (int64_t o = 0; o < runs.outer; ++o) {
    for (int64_t m = 0; m < runs.middle; ++m) {
      const int64_t start = (o * runs.outer_stride + m * runs.middle_stride) * kPanel;
      const T* ra = a + start;
      const T* rb = b + start;
      for (int64_t left = runs.inner; left > 0;) {
        const int64_t count = left < kFlushRows ? left : kFlushRows;
        for (int64_t r = 0; r < count; ++r, ra += kPanel, rb += kPanel) {
          V columns[kVectors];
          for (int v = 0; v < kVectors; ++v) columns[v] = *reinterpret_cast<const V*>(rb + v * kLanes);
          for (int i = 0; i < R; ++i) {
            for (int v = 0; v < kVectors; ++v) sum[i][v] += ra[i] * columns[v];
          }
        }
        left -= count;
        summed += count;
        if (summed >= kFlushRows) flush();
      }
    }
  }
  flush();
}

template <class T>
void gram(const Runs& runs, const T* a, const T* b, int rows, T* tile) {
  constexpr int kFit = kAccumulators / Vector<T>::kPerPanel;
  constexpr int kRows = kFit < 1 ? 1 : kFit > kPanel ? kPanel : kFit;  // tile rows whose sums fit the registers
  int i = 0;
  for (; rows - i >= kRows; i += kRows) gram_rows<T, kRows>(runs, a + i, b, tile + i * kPanel);
  if constexpr (kRows < 8) {
    if (i < rows) gram_rows<T, kRows>(runs, a + i, b, tile + i * kPanel);
  } else {
    for (; rows - i > 4; i += 8) gram_rows<T, 8>(runs, a + i, b, tile + i * kPanel);
    if (i < rows) gram_rows<T, 4>(runs, a + i, b, tile + i * kPanel);
  }
}

// lane += sum over `runs` of term(r), term a panel-wide vector
template <class T, class Term>
KFAC_INLINE void sum_lanes(const Runs& runs, T* lane, Term term) {
  using V = typename Vector<T>::type;
  constexpr int kVectors = Vector<T>::kPerPanel, kLanes = Vector<T>::kLanes;
  V total[kVectors];
  for (int v = 0; v < kVectors; ++v) total[v] = *reinterpret_cast<V*>(lane + v * kLanes);
  for (int64_t o = 0; o < runs.outer; ++o) {
    V sum[kVectors] = {};  // one outer run at a time: sums of sums drift less
    for (int64_t m = 0; m < runs.middle; ++m) {
      const int64_t start = o * runs.outer_stride + m * runs.middle_stride;
      for (int64_t r = start; r < start + runs.inner; ++r) {
        for (int v = 0; v < kVectors; ++v) sum[v] += term(r * kPanel + v * kLanes);
      }
    }
    for (int v = 0; v < kVectors; ++v) total[v] += sum[v];
  }
  for (int v = 0; v < kVectors; ++v) *reinterpret_cast<V*>(lane + v * kLanes) = total[v];
}

template <class T>
void gram_diagonal(const Runs& runs, const T* a, const T* b, T* lane) {
  using V = typename Vector<T>::type;
  sum_lanes(runs, lane,
            [a, b](int64_t at) { return *reinterpret_cast<const V*>(a + at) * *reinterpret_cast<const V*>(b + at); });
}

template <class T>
void column_sums(const Runs& runs, const T* a, T* lane) {
  using V = typename Vector<T>::type;
  sum_lanes(runs, lane, [a](int64_t at) { return *reinterpret_cast<const V*>(a + at); });
}

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

#ifdef __AVX512F__
// Transposes 16 rows of 16 floats in registers: butterflies that exchange blocks of 8, 4, 2 and 1 lanes.
template <int kDistance>
KFAC_INLINE void butterfly(Vector<float>::type* rows) {
  typedef int32_t Lanes __attribute__((vector_size(64)));
  Lanes upper, lower;  // which lanes of (a, b) make up the two new rows; constants once unrolled
  for (int l = 0; l < kPanel; ++l) {
    upper[l] = (l & kDistance) ? kPanel + l - kDistance : l;
    lower[l] = (l & kDistance) ? kPanel + l : l + kDistance;
  }
  for (int i = 0; i < kPanel; ++i) {
    if (i & kDistance) continue;
    const Vector<float>::type a = rows[i], b = rows[i + kDistance];
    rows[i] = __builtin_shuffle(a, b, upper);
    rows[i + kDistance] = __builtin_shuffle(a, b, lower);
  }
}
#endif

// Rows of consecutive floats, 16 at a time; returns how many were done.
KFAC_INLINE int64_t interleave_blocks(const void* const* sources, int64_t count, float* target, int64_t target_stride) {
  int64_t r = 0;
#ifdef __AVX512F__
  using V = Vector<float>::type;
  for (; r + kPanel <= count; r += kPanel) {
    V rows[kPanel];
    for (int i = 0; i < kPanel; ++i) {
      rows[i] = sources[i] ? *reinterpret_cast<const V*>(static_cast<const float*>(sources[i]) + r) : V{};
    }
    butterfly<8>(rows);
    butterfly<4>(rows);
    butterfly<2>(rows);
    butterfly<1>(rows);
    for (int i = 0; i < kPanel; ++i) *reinterpret_cast<V*>(target + (r + i) * target_stride) = rows[i];
  }
#else
  (void)sources, (void)count, (void)target, (void)target_stride;
#endif
  return r;
}

template <class S, class T>
void interleave_from(const void* const* sources, int64_t count, int64_t stride, T* target, int64_t target_stride) {
  if (const int lanes = contiguous_lanes<S>(sources)) {
    const S* row = static_cast<const S*>(sources[0]);
    for (int64_t r = 0; r < count; ++r, row += stride, target += target_stride) {
      for (int i = 0; i < kPanel; ++i) target[i] = i < lanes ? T(row[i]) : T(0);
    }
    return;
  }
  static const S kZero{};
  const S* from[kPanel];
  int64_t step[kPanel];
  for (int i = 0; i < kPanel; ++i) {
    from[i] = sources[i] ? static_cast<const S*>(sources[i]) : &kZero;
    step[i] = sources[i] ? stride : 0;
  }
  int64_t done = 0;
  if constexpr (__is_same(S, float) && __is_same(T, float)) {
    if (stride == 1) done = interleave_blocks(sources, count, target, target_stride);
  }
  for (int64_t r = done; r < count; ++r) {
    for (int i = 0; i < kPanel; ++i) target[r * target_stride + i] = T(from[i][r * step[i]]);
  }
}

template <class T>
void interleave(const void* const* sources, DType dtype, int64_t count, int64_t stride, T* target,
                int64_t target_stride) {
  switch (dtype) {
    case DType::kFloat32:
      return interleave_from<float>(sources, count, stride, target, target_stride);
    case DType::kFloat64:
      return interleave_from<double>(sources, count, stride, target, target_stride);
    case DType::kBFloat16:
      return interleave_from<BFloat16>(sources, count, stride, target, target_stride);
    case DType::kFloat16:
      return interleave_from<Float16>(sources, count, stride, target, target_stride);
  }
}

template <class S, class T>
void convert_from(const void* source, int64_t count, int64_t stride, T* target) {
  const S* from = static_cast<const S*>(source);
  if (stride == 1) {
    for (int64_t r = 0; r < count; ++r) target[r] = T(from[r]);
  } else {
    for (int64_t r = 0; r < count; ++r) target[r] = T(from[r * stride]);
  }
}

template <class T>
void convert(const void* source, DType dtype, int64_t count, int64_t stride, T* target) {
  switch (dtype) {
    case DType::kFloat32:
      return convert_from<float>(source, count, stride, target);
    case DType::kFloat64:
      return convert_from<double>(source, count, stride, target);
    case DType::kBFloat16:
      return convert_from<BFloat16>(source, count, stride, target);
    case DType::kFloat16:
      return convert_from<Float16>(source, count, stride, target);
  }
}

template <class T>
KFAC_INLINE T blend(T old, T value, T decay, T scale) {
  return decay == 0 ? scale * value : decay * old + scale * value;
}

template <class T>
void blend_tile(const T* tile, int rows, int columns, T decay, T scale, T* out, int64_t out_stride) {
  for (int r = 0; r < rows; ++r, tile += kPanel, out += out_stride) {
    if (columns == kPanel) {
      for (int c = 0; c < kPanel; ++c) out[c] = blend(out[c], tile[c], decay, scale);
    } else {
      for (int c = 0; c < columns; ++c) out[c] = blend(out[c], tile[c], decay, scale);
    }
  }
}

template <class T>
void sum_lines(const T* const* lines, const int64_t* first, int count, int64_t offset, T* sums) {
  using V = typename Vector<T>::type;
  constexpr int kVectors = Vector<T>::kPerPanel, kLanes = Vector<T>::kLanes;
  for (int q = 0; q < count; ++q, sums += kPanel) {
    V total[kVectors] = {};
    for (int64_t l = first[q]; l < first[q + 1]; ++l) {
      const T* line = lines[l] + offset;
      for (int v = 0; v < kVectors; ++v) total[v] += *reinterpret_cast<const V*>(line + v * kLanes);
    }
    for (int v = 0; v < kVectors; ++v) *reinterpret_cast<V*>(sums + v * kLanes) = total[v];
  }
}

#ifdef __AVX512F__
// Up to 16 taps: the lines are transposed in registers, so that each channel's taps are one masked vector.
KFAC_INLINE void blend_few_taps(const float* lines, int taps, float decay, float scale, float* out) {
  using V = Vector<float>::type;
  V rows[kPanel];
  for (int q = 0; q < kPanel; ++q) rows[q] = q < taps ? *reinterpret_cast<const V*>(lines + q * kPanel) * scale : V{};
  butterfly<8>(rows);
  butterfly<4>(rows);
  butterfly<2>(rows);
  butterfly<1>(rows);
  const __mmask16 mask = static_cast<__mmask16>((1u << taps) - 1);
  for (int c = 0; c < kPanel; ++c, out += taps) {
    __m512 value = reinterpret_cast<__m512&>(rows[c]);
    if (decay != 0) value = _mm512_fmadd_ps(_mm512_set1_ps(decay), _mm512_maskz_loadu_ps(mask, out), value);
    _mm512_mask_storeu_ps(out, mask, value);
  }
}
#endif

template <class T>
void blend_taps(const T* lines, int taps, int columns, T decay, T scale, T* out) {
#ifdef __AVX512F__
  if constexpr (__is_same(T, float)) {
    if (taps <= kPanel && columns == kPanel) return blend_few_taps(lines, taps, decay, scale, out);
  }
#endif
  for (int c = 0; c < columns; ++c, out += taps) {
    for (int q = 0; q < taps; ++q) out[q] = blend(out[q], lines[q * kPanel + c], decay, scale);
  }
}

#define KFAC_STRING_(x) #x
#define KFAC_STRING(x) KFAC_STRING_(x)

}  // namespace

extern const SimdKernels kSimdKernels;
const SimdKernels kSimdKernels = {
    KFAC_STRING(KFAC_SIMD),
    {gram<float>, gram_diagonal<float>, column_sums<float>, interleave<float>, convert<float>, blend_tile<float>,
     sum_lines<float>, blend_taps<float>},
    {gram<double>, gram_diagonal<double>, column_sums<double>, interleave<double>, convert<double>, blend_tile<double>,
     sum_lines<double>, blend_taps<double>},
};

}  // namespace KFAC_SIMD
}  // namespace kfac
