// Scores of the neurons of many layers in one launch: which block scores which neurons.
//
// Plain data and index maps only. csrc/cuda/saliency.cuh follows this schedule; tests/native runs the same code on the
// CPU.
//
// A tile is as many neurons as feed kSaliencyEdge columns. Its block multiplies G V for these columns, kSaliencyEdge
// outputs at a time, and adds V_J^T (G V)_J of every neuron at once: G V is never stored. Then it takes the traces with
// A_JJ or (H_JJ)^-1. The order of all sums is fixed.
#pragma once

#include <vector>

#include "kfac/covariance_group.h"
#include "kfac/device.h"
#include "kfac/saliency.h"

namespace kfac {

constexpr int kSaliencyThreads = 256, kSaliencyWarps = kSaliencyThreads / 32;
constexpr int kSaliencyEdge = 64;   // columns and outputs of a tile; the largest block of a neuron
constexpr int kSaliencyDepth = 16;  // rows of G and V in shared memory at a time
constexpr int kSaliencySide = 16, kSaliencyPer = kSaliencyEdge / kSaliencySide;  // a thread computes 4 x 4 of G V
constexpr int kSaliencyPitch = kSaliencyEdge + 1;
// lower triangles of all blocks of a tile have most entries where there is one block
constexpr int kSaliencyPairs = kSaliencyEdge * (kSaliencyEdge + 1) / 2;
constexpr int kSaliencyPairsPer = (kSaliencyPairs + kSaliencyThreads - 1) / kSaliencyThreads;
// G V and V, then in the same memory the lower triangles of V_J^T G V_J and of A_JJ or H_JJ in double
constexpr int kSaliencyTileFloats = 2 * kSaliencyEdge * kSaliencyPitch;
static_assert(kSaliencyTileFloats >= 4 * kSaliencyPairs, "");
constexpr int kSaliencyStageFloats = 2 * kSaliencyDepth * kSaliencyEdge;
constexpr int kSaliencySharedBytes = 4 * (kSaliencyTileFloats + kSaliencyStageFloats);
static_assert(kSaliencySharedBytes <= 48 << 10, "more needs an attribute of the kernel");

// What changes from call to call; as kernel parameters, of which there are 4 KB.
constexpr int kMaxSaliencyLayers = 120;
struct SaliencyPointers {
  const float* weight[kMaxSaliencyLayers];  // V [outputs, columns]
  const float* input[kMaxSaliencyLayers];   // A, or H: [>= columns, >= columns]; the lower triangle is read
  const float* G[kMaxSaliencyLayers];       // [outputs, outputs] symmetric
  float* scores[kMaxSaliencyLayers];        // [neurons]
};

struct SaliencyJob {
  int64_t weight_stride, input_stride, G_stride;
  int32_t outputs, block, neurons, tile_neurons, place;
  int32_t first_neuron;  // in the list of flags: neurons of the layers before
};

struct SaliencyLayer {
  int64_t outputs, columns, block, weight_stride, input_stride, G_stride;
};

// The neurons of a tile and their columns.
struct SaliencyWork {
  int32_t first, count, first_column, columns, pairs;  // pairs: of one block's lower triangle
};

KFAC_HD SaliencyWork saliency_work(const SaliencyJob& job, int32_t tile) {
  const int32_t first = tile * job.tile_neurons, count = smaller(job.tile_neurons, job.neurons - first);
  return {first, count, first * job.block, count * job.block, job.block * (job.block + 1) / 2};
}

// Entry `at` of a tile's lower triangles, block after block: two columns of the tile, row >= column.
struct SaliencyPair {
  int32_t row, column;
};

KFAC_HD SaliencyPair saliency_pair(const SaliencyJob& job, const SaliencyWork& work, int32_t at) {
  const int32_t neuron = at / work.pairs;
  const TilePair within = tile_pair(at - neuron * work.pairs, job.block, true);
  return {neuron * job.block + within.i, neuron * job.block + within.j};
}

// The schedule for layers of these shapes; only pointers change between calls.
class SaliencyGroup {
 public:
  // Throws std::invalid_argument for more than kMaxSaliencyLayers, or a block of more than kSaliencyEdge columns.
  explicit SaliencyGroup(const std::vector<SaliencyLayer>& layers);

  int64_t layers() const { return layers_; }
  int32_t tiles() const { return tiles_; }
  double products() const { return products_; }  // multiply-adds of G V, padding included, for rooflines
  // Plain data that the kernel reads: a copy on the device, 16-byte aligned, is what `schedule` wants.
  const std::vector<char>& descriptors() const { return descriptors_; }
  JobList<SaliencyJob> schedule(const void* descriptors) const;

 private:
  int64_t layers_, first_offset_ = 0;
  int32_t tiles_ = 0;
  double products_ = 0;
  std::vector<char> descriptors_;
};

}  // namespace kfac
