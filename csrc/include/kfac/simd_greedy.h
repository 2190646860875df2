// The vectorised inner loops of greedy selection; see simd.h for how they are compiled and chosen.
#pragma once

#include "kfac/simd.h"

namespace kfac {

template <class T>
struct GreedyKernels {
  // out[i][c] += sum over k < count of factors[k * outs + i] rows[k][c], for i < outs, c < columns
  void (*add_rows)(int64_t outs, int64_t count, int64_t columns, const T* factors, const T* const* rows, T* out,
                   int64_t out_stride);
};

struct GreedySimd {
  GreedyKernels<float> f32;
  GreedyKernels<double> f64;
  // kPanel neurons at once, one a lane: for x, y [ranks][size][kPanel], B -= x^T x and F -= y^T x + x^T y, symmetric
  // and given as their lower triangles [size (size + 1) / 2][kPanel].
  void (*lane_updates)(int size, int64_t ranks, const double* x, const double* y, double* B, double* F);
};

const GreedySimd& greedy_simd();

template <class T>
const GreedyKernels<T>& greedy_kernels();
template <>
inline const GreedyKernels<float>& greedy_kernels() {
  return greedy_simd().f32;
}
template <>
inline const GreedyKernels<double>& greedy_kernels() {
  return greedy_simd().f64;
}

}  // namespace kfac
