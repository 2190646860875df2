// Inner loops, compiled once per instruction set with KFAC_SIMD naming the namespace.
// Nothing here may instantiate a template or inline function of another file: the linker could pick this file's copy,
// with instructions the processor lacks, for everyone.
#include "kfac/simd.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "simd_pack.h"

namespace kfac {
namespace KFAC_SIMD {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kAccumulators = 16;  // of 32 registers
#elif defined(__AVX__)
constexpr int kAccumulators = 12;  // of 16 registers
#else
constexpr int kAccumulators = 8;  // of 16 registers
#endif

template <class T>
constexpr int kPerPanel = kPanel / Vector<T>::kLanes;  // vectors

// Rows summed in registers before they are added to memory: long float sums drift, pairwise ones do not.
constexpr int64_t kFlushRows = 64;
// Rows of two panels that stay in the first-level cache while a tile's rows are summed a few at a time.
constexpr int64_t kBlockRows = 192;

// tile[0..R)[0..kPanel) += sum over `runs` of a[r][0..R) b[r][0..kPanel)
template <class T, int R>
KFAC_INLINE void gram_rows(const Runs& runs, const T* a, const T* b, T* tile) {
  using V = typename Vector<T>::type;
  constexpr int kVectors = kPerPanel<T>, kLanes = Vector<T>::kLanes;
  V sum[R][kVectors] = {};
  int64_t summed = 0;
  auto flush = [&]() {
    for (int i = 0; i < R; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        T* target = tile + i * kPanel + v * kLanes;
        store(target, load(target) + sum[i][v]);
        sum[i][v] = V{};
      }
    }
    summed = 0;
  };
  for (int64_t o = 0; o < runs.outer; ++o) {
    const T* ra = a + o * runs.stride * kPanel;
    const T* rb = b + o * runs.stride * kPanel;
    for (int64_t left = runs.inner; left > 0;) {
      const int64_t count = left < kFlushRows ? left : kFlushRows;
      for (int64_t r = 0; r < count; ++r, ra += kPanel, rb += kPanel) {
        V columns[kVectors];
        for (int v = 0; v < kVectors; ++v) columns[v] = load(rb + v * kLanes);
        for (int i = 0; i < R; ++i) {
          for (int v = 0; v < kVectors; ++v) sum[i][v] += ra[i] * columns[v];
        }
      }
      left -= count;
      summed += count;
      if (summed >= kFlushRows) flush();
    }
  }
  flush();
}

// Tile rows whose sums fit the registers.
template <class T>
constexpr int rows_at_once() {
  const int fit = kAccumulators / kPerPanel<T>;
  return fit >= 16 ? 16 : fit >= 8 ? 8 : fit >= 6 ? 6 : fit >= 4 ? 4 : fit >= 2 ? 2 : 1;
}

// `gram` of so few rows that what the passes over them read stays in the first-level cache.
template <class T>
KFAC_INLINE void gram_block(const Runs& runs, const T* a, const T* b, int rows, T* tile) {
  constexpr int kRows = rows_at_once<T>();
  int i = 0;
  // 16 rows are 6, 6 and 4, but 8 are 4 and 4
  for (; rows - i >= kRows && !(kRows == 6 && rows - i == 8); i += kRows) {
    gram_rows<T, kRows>(runs, a + i, b, tile + i * kPanel);
  }
  if constexpr (kRows >= 8) {
    for (; rows - i > 4; i += 8) gram_rows<T, 8>(runs, a + i, b, tile + i * kPanel);
  }
  constexpr int kRest = kRows < 4 ? kRows : 4;
  for (; i < rows; i += kRest) gram_rows<T, kRest>(runs, a + i, b, tile + i * kPanel);
}

template <class T>
void gram(const Runs& runs, const T* a, const T* b, int rows, T* tile) {
  if (runs.inner == 0) return;
  const int64_t length = runs.inner < kBlockRows ? runs.inner : kBlockRows;
  const int64_t lines = runs.inner < kBlockRows ? kBlockRows / runs.inner : 1;
  for (int64_t o = 0; o < runs.outer; o += lines) {
    for (int64_t r = 0; r < runs.inner; r += length) {
      const Runs block{runs.outer - o < lines ? runs.outer - o : lines, runs.stride,
                       runs.inner - r < length ? runs.inner - r : length};
      const int64_t start = (o * runs.stride + r) * kPanel;
      gram_block(block, a + start, b + start, rows, tile);
    }
  }
}

// lane += sum over `runs` of term(r), term a panel-wide vector
template <class T, class Term>
KFAC_INLINE void sum_lanes(const Runs& runs, T* lane, Term term) {
  using V = typename Vector<T>::type;
  constexpr int kVectors = kPerPanel<T>, kLanes = Vector<T>::kLanes;
  V total[kVectors];
  for (int v = 0; v < kVectors; ++v) total[v] = load(lane + v * kLanes);
  for (int64_t o = 0; o < runs.outer; ++o) {
    V sum[kVectors] = {};  // one outer run at a time: sums of sums drift less
    for (int64_t r = o * runs.stride; r < o * runs.stride + runs.inner; ++r) {
      for (int v = 0; v < kVectors; ++v) sum[v] += term(r * kPanel + v * kLanes);
    }
    for (int v = 0; v < kVectors; ++v) total[v] += sum[v];
  }
  for (int v = 0; v < kVectors; ++v) store(lane + v * kLanes, total[v]);
}

template <class T>
void gram_diagonal(const Runs& runs, const T* a, const T* b, T* lane) {
  sum_lanes(runs, lane, [a, b](int64_t at) { return load(a + at) * load(b + at); });
}

template <class T>
void column_sums(const Runs& runs, const T* a, T* lane) {
  sum_lanes(runs, lane, [a](int64_t at) { return load(a + at); });
}

template <class T>
KFAC_INLINE T blend(T old, T value, T decay, T scale) {
  return decay == 0 ? scale * value : decay * old + scale * value;
}

template <class T>
void transpose_tile(const T* tile, T* target, int64_t target_stride) {
  using V = typename Vector<T>::type;
  constexpr int kLanes = Vector<T>::kLanes;
  for (int r = 0; r < kPanel; r += kLanes) {
    for (int c = 0; c < kPanel; c += kLanes) {
      V rows[kLanes];
      for (int i = 0; i < kLanes; ++i) rows[i] = load(tile + (r + i) * kPanel + c);
      transpose<T>(rows);
      for (int i = 0; i < kLanes; ++i) store(target + (c + i) * target_stride + r, rows[i]);
    }
  }
}

template <class T>
void blend_tile(const T* tile, int64_t stride, int rows, int columns, T decay, T scale, T* out, int64_t out_stride) {
  for (int r = 0; r < rows; ++r, tile += stride, out += out_stride) {
    if (columns == kPanel) {
      for (int c = 0; c < kPanel; ++c) out[c] = blend(out[c], tile[c], decay, scale);
    } else {
      for (int c = 0; c < columns; ++c) out[c] = blend(out[c], tile[c], decay, scale);
    }
  }
}

template <class T>
void sum_lines(const T* const* lines, const int64_t* first, int count, int64_t offset, T scale, T* sums) {
  using V = typename Vector<T>::type;
  constexpr int kVectors = kPerPanel<T>, kLanes = Vector<T>::kLanes;
  for (int q = 0; q < count; ++q, sums += kPanel) {
    V total[kVectors] = {};
    for (int64_t l = first[q]; l < first[q + 1]; ++l) {
      const T* line = lines[l] + offset;
      for (int v = 0; v < kVectors; ++v) total[v] += load(line + v * kLanes);
    }
    for (int v = 0; v < kVectors; ++v) store(sums + v * kLanes, scale * total[v]);
  }
}

#ifdef __AVX512F__
// Up to 16 taps: the lines are transposed in registers, so that each channel's taps are one masked vector.
KFAC_INLINE void blend_few_taps(const float* lines, int taps, float decay, float* out) {
  using V = Vector<float>::type;
  V rows[kPanel];
  for (int q = 0; q < kPanel; ++q) rows[q] = q < taps ? load(lines + q * kPanel) : V{};
  transpose<float>(rows);
  const __mmask16 mask = static_cast<__mmask16>((1u << taps) - 1);
  for (int c = 0; c < kPanel; ++c, out += taps) {
    __m512 value = reinterpret_cast<__m512&>(rows[c]);
    if (decay != 0) value = _mm512_fmadd_ps(_mm512_set1_ps(decay), _mm512_maskz_loadu_ps(mask, out), value);
    _mm512_mask_storeu_ps(out, mask, value);
  }
}
#endif

template <class T>
void blend_taps(const T* lines, int taps, int columns, T decay, T* out) {
#ifdef __AVX512F__
  if constexpr (__is_same(T, float)) {
    if (taps <= kPanel && columns == kPanel) return blend_few_taps(lines, taps, decay, out);
  }
#endif
  using V = typename Vector<T>::type;
  constexpr int kLanes = Vector<T>::kLanes;
  int first = 0;  // of the taps that are left
  for (; first + kLanes <= taps; first += kLanes) {
    for (int channel = 0; channel < columns; channel += kLanes) {
      V rows[kLanes];
      for (int q = 0; q < kLanes; ++q) rows[q] = load(lines + (first + q) * kPanel + channel);
      transpose<T>(rows);
      for (int c = 0; c < kLanes && channel + c < columns; ++c) {
        T* target = out + (channel + c) * taps + first;
        store(target, decay == 0 ? rows[c] : decay * load(target) + rows[c]);
      }
    }
  }
  for (int c = 0; c < columns; ++c, out += taps) {
    for (int q = first; q < taps; ++q) {
      const T line = lines[q * kPanel + c];
      out[q] = decay == 0 ? line : decay * out[q] + line;
    }
  }
}

}  // namespace

extern const SimdKernels kSimdKernels;
const SimdKernels kSimdKernels = {
    KFAC_STRING(KFAC_SIMD),
    {gram<float>, gram_diagonal<float>, column_sums<float>, interleave<float>, convert<float>, transpose_tile<float>,
     blend_tile<float>, sum_lines<float>, blend_taps<float>},
    {gram<double>, gram_diagonal<double>, column_sums<double>, interleave<double>, convert<double>,
     transpose_tile<double>, blend_tile<double>, sum_lines<double>, blend_taps<double>},
};

}  // namespace KFAC_SIMD
}  // namespace kfac
