// The vectorised inner loops, compiled once per instruction set and chosen once at run time.
//
// A *panel* holds kPanel channels of many rows, [rows][kPanel], zero where there is no channel: whatever the number of
// channels is, every inner loop is full vectors over contiguous memory.
#pragma once

#include "kfac/types.h"

namespace kfac {

constexpr int kPanel = 16;
constexpr int kTile = kPanel * kPanel;

// Which rows of a panel a sum runs over: `outer` runs of `inner` consecutive rows, the first of each `stride` rows on.
struct Runs {
  int64_t outer, stride;
  int64_t inner;
};

template <class T>
struct PanelKernels {
  // tile[i][j] += sum over rows r of a[r][i] b[r][j], for i < rows (1..kPanel; rounded up to a multiple of 4) and all j
  void (*gram)(const Runs& runs, const T* a, const T* b, int rows, T* tile);
  // lane[i] += sum over rows r of a[r][i] b[r][i]
  void (*gram_diagonal)(const Runs& runs, const T* a, const T* b, T* lane);
  // lane[i] += sum over rows r of a[r][i]
  void (*column_sums)(const Runs& runs, const T* a, T* lane);
  // target[r * target_stride + i] = T(sources[i][r * source_stride]) for r < count, i < kPanel; null sources give 0
  void (*interleave)(const void* const* sources, DType dtype, int64_t count, int64_t source_stride, T* target,
                     int64_t target_stride);
  // target[r] = T(source[r * source_stride]) for r < count
  void (*convert)(const void* source, DType dtype, int64_t count, int64_t source_stride, T* target);
  // target[c * target_stride + r] = tile[r][c]
  void (*transpose_tile)(const T* tile, T* target, int64_t target_stride);
  // out[r][c] <- decay out[r][c] + scale tile[r][c], rows `stride` and `out_stride` apart; decay 0 overwrites `out`,
  // NaN included
  void (*blend_tile)(const T* tile, int64_t stride, int rows, int columns, T decay, T scale, T* out,
                     int64_t out_stride);
  // sums[q][i] = scale sum over first[q] <= l < first[q + 1] of lines[l][offset + i], q < count
  void (*sum_lines)(const T* const* lines, const int64_t* first, int count, int64_t offset, T scale, T* sums);
  // out[c * taps + q] <- decay out[c * taps + q] + lines[q][c]; decay 0 overwrites `out`
  void (*blend_taps)(const T* lines, int taps, int columns, T decay, T* out);
};

struct SimdKernels {
  const char* name;
  PanelKernels<float> f32;
  PanelKernels<double> f64;
};

// The kernels of the best instruction set this processor has; the environment variable KFAC_SIMD names a lesser one.
const SimdKernels& simd();

template <class T>
const PanelKernels<T>& panel_kernels();
template <>
inline const PanelKernels<float>& panel_kernels() {
  return simd().f32;
}
template <>
inline const PanelKernels<double>& panel_kernels() {
  return simd().f64;
}

}  // namespace kfac
