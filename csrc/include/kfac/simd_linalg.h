// The vectorised inner loops of power iteration, inverses and saliency; see simd.h for how they are compiled and
// chosen.
#pragma once

#include "kfac/simd.h"

namespace kfac {

// Matrices are row-major, `stride` elements from row to row; a count marked (*) is a multiple of kPanel.
template <class T>
struct LinalgKernels {
  // y[j] = sum of v[i] a[i][j] over i < rows, for j < columns (*)
  void (*left_product)(int64_t rows, int64_t columns, const T* a, int64_t stride, const T* v, T* y);
  // The part of A v, A symmetric, that rows [first, last) of its lower triangle hold, first (*): with b the start of
  // row i's diagonal block (b (*), b <= i < b + kPanel), y[i] += sum of a[i][j] v[j] over j < b + kPanel and, for j <
  // b, y[j] += a[i][j] v[i]. `corner` [kPanel][kPanel] stands in for the last diagonal block, zero beyond the matrix.
  void (*lower_product)(int64_t first, int64_t last, int64_t n, const T* a, int64_t stride, const T* corner, const T* v,
                        T* y);
  // out = {v.y, y.y, |y - (v.y) v|^2}
  void (*rayleigh)(int64_t n, const double* y, const T* v, double* out);
  // t[r] += sum of x[r][j] v[j] over j < columns (*), r < rows <= kRowBlock; then w[j] += sum of t[r] x[r][j]
  void (*row_products)(int rows, int64_t columns, const T* x, int64_t stride, const T* v, T* t, T* w);
  // u[p] = start + sum of v[k] base[offsets[k] + p] over k < taps, for p < count (*)
  void (*filter)(int64_t taps, const int64_t* offsets, const T* base, const T* v, T start, int64_t count, T* u);
  // w[k] += sum of u[p] base[offsets[k] + p] over p < count (*)
  void (*filter_gradient)(int64_t taps, const int64_t* offsets, const T* base, const T* u, int64_t count, T* w);
  // s [kPanel][kPanel] holds -B, symmetric. l <- L^-1 for B = L L^T, zero above the diagonal. Returns 0, or k if the
  // leading minor of order k is not positive (or not finite).
  int (*invert_factor)(const T* s, T* l);
  // out[i][lane] = sum of a[r][lane] b_i[r][lane] over r < rows, with panels b_i at b + i b_stride, i < count
  void (*lane_dots)(int64_t count, int64_t rows, const T* a, const T* b, int64_t b_stride, double* out);
};

constexpr int kRowBlock = 8;

struct LinalgSimd {
  LinalgKernels<float> f32;
  LinalgKernels<double> f64;
  // kPanel problems at once, one a lane: out = tr(F B^-1), F and B symmetric [size][size], given as their lower
  // triangles [size (size + 1) / 2][kPanel]; B is overwritten. pivots: the least one of B, positive for a definite B.
  void (*lane_traces)(int size, const double* F, double* B, double* out, double* pivots);
};

const LinalgSimd& linalg_simd();

template <class T>
const LinalgKernels<T>& linalg_kernels();
template <>
inline const LinalgKernels<float>& linalg_kernels() {
  return linalg_simd().f32;
}
template <>
inline const LinalgKernels<double>& linalg_kernels() {
  return linalg_simd().f64;
}

}  // namespace kfac
