// Damped inverses of symmetric positive definite matrices.
#pragma once

#include "kfac/types.h"

namespace kfac {

struct InverseProblem {
  const void* matrix;  // [n, n], row stride `stride`; the lower triangle is read
  int64_t n, stride;
  double damping;        // added to the diagonal,
  const void* diagonal;  // [n] or null, likewise
  void* inverse;         // [n, n] contiguous, may not overlap the matrix
  int info;              // out: 0, or k if the leading minor of order k is not positive definite; `inverse` is NaN then
};

// inverse <- (M + (damping + diagonal) I)^-1, exactly symmetric, of every problem; all of type kFloat32 or kFloat64.
void damped_inverse_cpu(InverseProblem* problems, int64_t count, DType dtype, int threads);

}  // namespace kfac
