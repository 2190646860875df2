// Scores of neurons by what their removal costs, and the compensation of those that stay.
#pragma once

#include "kfac/types.h"

namespace kfac {

enum class Saliency : int { kObd = 0, kObs = 1 };

// A layer with weights V [outputs, columns]: neuron j feeds the columns J = [j block, (j + 1) block).
struct SaliencyProblem {
  const void* weight;  // [outputs, columns], row stride weight_stride
  int64_t outputs, columns, weight_stride;
  const void* input;  // A, or H = (A + D)^-1 for kObs: [>= columns, >= columns], row stride input_stride
  int64_t input_stride;
  const void* G;  // [outputs, outputs], row stride G_stride
  int64_t G_stride;
  int64_t block;
  void* scores;    // out: [columns / block]
  int64_t failed;  // out: the first neuron whose block H_JJ is not positive definite, or -1
};

// S_j = 1/2 tr(V_J^T G V_J A_JJ), or 1/2 tr(V_J^T G V_J (H_JJ)^-1) for kObs; all of type kFloat32 or kFloat64.
void saliency_cpu(SaliencyProblem* problems, int64_t count, Saliency kind, DType dtype, int threads);

struct CompensationProblem {
  const void* weight;  // W [outputs, columns], row stride weight_stride
  int64_t outputs, weight_stride;
  const void* inverse;  // H [columns, columns], row stride inverse_stride
  int64_t inverse_stride;
  const int64_t* pruned;  // J, `removed` columns
  int64_t removed;
  const int64_t* kept;  // K
  int64_t remaining;
  void* out;     // [outputs, remaining] contiguous
  int64_t info;  // out: 0, or k if the leading minor of order k of H_JJ is not positive definite
};

// out <- W_K - W_J (H_JJ)^-1 H_JK
void compensate_cpu(CompensationProblem* problems, int64_t count, DType dtype, int threads);

}  // namespace kfac
