// Neurons that go one after the other under optimal brain surgeon: one step of a block-pivoted Cholesky factorisation.
//
// For a layer with weights V [O, n], H = (A + D)^-1 and G, let the columns J go after others have gone:
//
//   T T^T = H_JJ,  L_J = H_.J T^-T,  P_J = V_.J T^-T        (H and V as they are now)
//   H <- H - L_J L_J^T,  V <- V - P_J L_J^T
//
// H is not updated: row j of its memory becomes the column of L of a column j that went, so that H now is H - L L^T,
// and one pass over L gives the rows of H now that a step needs. P_J L_J^T is subtracted from V for many columns at
// once; until then P_J is *pending*. What the scores 1/2 tr(V_J^T G V_J (H_JJ)^-1) of the neurons that stay need is
// kept up to date: the diagonal blocks of H and of V^T G V.
#pragma once

#include "kfac/types.h"

namespace kfac {

// Neurons that feed equally many columns of a layer.
struct GreedyNeurons {
  const int64_t* columns;  // [count, block]
  int64_t count, block;
  double* blocks;  // [count, block, block]: H now at the columns of each neuron; the lower triangle is used
  double* forms;   // [count, block, block]: V^T G V now, likewise
  double* scores;  // [count] out; infinite for neurons that went
};

struct GreedyProblem {
  void* weight;  // V [outputs, columns], row stride weight_stride; without what is pending
  int64_t outputs, columns, weight_stride;
  void* inverse;  // H [columns, columns], row stride inverse_stride; rows of columns that went hold L
  int64_t inverse_stride;
  const void* G;  // [outputs, outputs] symmetric, row stride G_stride
  int64_t G_stride;
  int64_t* removed;  // [columns]: the columns that went, in this order; those that go are appended
  int64_t removed_count;
  void* pending;                            // [pending_capacity, outputs]: P of the latest columns that went
  int64_t pending_count, pending_capacity;  // pending_count in and out
  const int64_t* lost;                      // J [lost_count], may be empty: then only the scores are computed
  int64_t lost_count;
  const GreedyNeurons* neurons;  // every neuron of the layer, in lists
  int64_t lists;
  double change;                       // out: 1/2 tr(V_J^T G V_J (H_JJ)^-1) of all J together
  int64_t failed_column;               // out: the place in J where H_JJ is not positive definite, or -1
  int64_t failed_list, failed_neuron;  // out: a neuron that stays whose block is not positive definite, or -1
};

// All of type kFloat32 or kFloat64. If a failed_column is not -1, nothing is changed in any layer. Throws
// std::invalid_argument, before anything is changed, for columns that are none or are there twice; interrupts are
// heeded until then. Where it throws for lack of memory the layers are no use any more.
void greedy_remove_cpu(GreedyProblem* problems, int64_t count, DType dtype, int threads);

}  // namespace kfac
