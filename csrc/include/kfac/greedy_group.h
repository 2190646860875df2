// A step of greedy selection on a GPU: what its kernels share, and who does what. See kfac/greedy.h for the equations.
//
// One launch after the other on a stream, for each layer; nothing waits for the host:
//   gather    -L_J of the columns that went before, and V_J: a thread an entry
//   pivot     T^-1 of H_JJ = T T^T: one block
//   weights   P^T = T^-1 (V_J - pending)^T: a thread an output
//   products  G P: a warp an output
//   forms     what rows of pending and new L are multiplied by in Y^T = X^T - 1/2 (P^T G P) L^T: a warp an entry
//   columns   the new rows of L^T, in place of rows J of H, and Y^T: a block kGreedyColumns columns
//   scores    blocks of H and V^T G V, scores: a warp a neuron
//   finish    P joins what is pending, or all of it is subtracted from V: a thread some entries
// Where a pivot is not positive definite in any layer, all that follows returns at once. The order of all sums is
// fixed.
#pragma once

#include "kfac/device.h"

namespace kfac {

constexpr int kGreedyThreads = 256, kGreedyWarps = kGreedyThreads / 32;
constexpr int kGreedyColumns = 32;   // of a block: one a lane; its warps share the rows
constexpr int kGreedySums = 8;       // rows of a product in registers
constexpr int kMaxGreedyBlock = 64;  // columns of a neuron, and columns that go at once
constexpr int kGreedyPairs = kMaxGreedyBlock * (kMaxGreedyBlock + 1) / 2;
constexpr int kGreedyPivotBytes = 2 * 8 * kGreedyPairs;  // lower triangles of T and T^-1
// rows J of H now and of L^T, then the warps' sums
constexpr int kGreedyColumnFloats = 2 * kMaxGreedyBlock * kGreedyColumns + kGreedyWarps * kGreedySums * kGreedyColumns;
constexpr int kGreedyColumnBytes = 4 * kGreedyColumnFloats;
constexpr int kGreedyScoreBytes = 2 * 8 * kGreedyPairs;  // lower triangles of the blocks and forms of a block's neurons
static_assert(kGreedyPivotBytes <= 48 << 10 && kGreedyColumnBytes <= 48 << 10, "more needs an attribute of the kernel");

// One layer and the columns that go. Matrices with a row for each of these are [q][...].
struct GreedyJob {
  float *V, *H;
  const float* G;
  int64_t V_stride, H_stride, G_stride;
  int32_t outputs, columns, q, removed_count, pending_count, pending_capacity;
  int64_t* removed;
  float* pending;
  const int64_t* lost;
  // workspace
  float* factors;     // [removed_count][q]: -L_J
  float* pivot;       // [q][q]: T^-1
  float* P;           // [q][outputs]: P^T
  float* forms;       // [outputs + pending_count + q][q]: what rows of V, of pending and of new L are multiplied by
  float* Y;           // [q][columns]
  double* change;     // out
  int64_t* failures;  // [layers][3] out: only the first of each is written, the place of a pivot that is not positive
  int32_t layer, layers;
};

struct GreedyList {
  const int64_t* columns;  // [count, block]
  int32_t count, block;
  double *blocks, *forms, *scores;  // scores: minus infinity where a block is not positive definite
};

// Floats of the workspace of a job.
KFAC_HD int64_t greedy_workspace(const GreedyJob& job) {
  const int64_t rows = job.removed_count + job.q + 2 * int64_t(job.outputs) + job.pending_count + job.q + job.columns;
  return rows * job.q;
}

// Lays the workspace out.
inline void place_greedy(GreedyJob& job, float* workspace) {
  job.factors = workspace;
  job.pivot = job.factors + int64_t(job.removed_count) * job.q;
  job.P = job.pivot + int64_t(job.q) * job.q;
  job.forms = job.P + int64_t(job.q) * job.outputs;
  job.Y = job.forms + (int64_t(job.outputs) + job.pending_count + job.q) * job.q;
}

// Neurons of a block of `greedy_scores`.
KFAC_HD int32_t greedy_neurons(int32_t block) {
  const int32_t fit = kGreedyPairs / (block * (block + 1) / 2);
  return fit < kGreedyWarps ? fit : kGreedyWarps;
}

}  // namespace kfac
