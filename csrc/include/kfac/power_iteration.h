// Dominant eigenpairs by power iteration: v <- A v / |A v| until |A v - lambda v| <= tol |lambda|, lambda = v.A v.
#pragma once

#include <functional>

#include "kfac/covariance.h"

namespace kfac {

struct PowerIteration {
  double tol;
  int max_iter;
};

struct Eigenpair {
  double value, residual;  // of the vector before the last step: residual = |A v - value v| / |value|
  int iterations;
};

struct EigenProblem {
  const void* matrix;  // [n, n] symmetric, row stride `stride`
  int64_t n, stride;
  void* vector;      // [n]: the start, then the eigenvector, of length one
  Eigenpair result;  // out
};

// Solves every problem, all of type kFloat32 or kFloat64. A start that is zero or not finite is replaced by
// start_vector. A matrix that is not finite gives NaN and leaves the vector as it was; the zero matrix gives 0.
void power_iteration_cpu(EigenProblem* problems, int64_t count, DType dtype, const PowerIteration& method, int threads);

// The same for the covariance A = 1/R sum of a a^T over the rows a of x [rows, columns] (then 1 if `bias`), which is
// never formed: A v = 1/R sum of (a.v) a.
Eigenpair row_covariance_power_iteration_cpu(const void* x, DType dtype, int64_t rows, int64_t columns,
                                             int64_t row_stride, int64_t column_stride, bool bias, void* vector,
                                             const PowerIteration& method, int threads);

// The same for the patches of a convolution (groups = 1): a.v is the convolution with the one filter v.
Eigenpair patch_covariance_power_iteration_cpu(const ImageView& image, const ConvShape& shape, bool bias, void* vector,
                                               const PowerIteration& method, int threads);

// Entries 1 + cos(1 + 1.7 i) / 2, scaled to length one: no natural eigenvector is orthogonal to it.
template <class T>
void start_vector(int64_t n, T* vector);

// image <- A v, in double; v has length one.
template <class T>
using Product = std::function<void(const T* v, double* image)>;

// Iterates from `vector` [n], which becomes the eigenvector.
template <class T>
Eigenpair iterate(const Product<T>& product, int64_t n, T* vector, const PowerIteration& method);

}  // namespace kfac
