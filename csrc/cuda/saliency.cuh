// Scores of neurons; who does what: kfac/saliency_group.h
#pragma once

#include "block_sum.cuh"
#include "kfac/saliency_group.h"

namespace kfac {

struct SaliencyMemory {
  float *product, *weight;  // [kSaliencyEdge][kSaliencyPitch]: rows of G V and of V
  float *G, *V;             // [kSaliencyDepth][kSaliencyEdge]: a stage
  double *forms, *inputs;   // [kSaliencyPairs]: lower triangles of V_J^T G V_J and of A_JJ or H_JJ; in the rows' place
};

KFAC_DEVICE SaliencyMemory saliency_memory(float* shared) {
  float* const weight = shared + kSaliencyEdge * kSaliencyPitch;
  float* const stage = shared + kSaliencyTileFloats;
  double* const forms = reinterpret_cast<double*>(shared);
  return {shared, weight, stage, stage + kSaliencyDepth * kSaliencyEdge, forms, forms + kSaliencyPairs};
}

// One layer's operands, and the columns of the tile.
struct SaliencyOperands {
  const float *weight, *input, *G;
  int32_t columns;
};

// product <- (G V)[output, output + kSaliencyEdge) for the tile's columns, zero beyond them.
template <class Block>
KFAC_DEVICE void multiply_G(Block& block, const SaliencyJob& job, const SaliencyOperands& from, int32_t output,
                            const SaliencyMemory& memory) {
  const int32_t y = block.thread() / kSaliencySide * kSaliencyPer, x = block.thread() % kSaliencySide * kSaliencyPer;
  float sums[kSaliencyPer][kSaliencyPer] = {};
  for (int32_t first = 0; first < job.outputs; first += kSaliencyDepth) {
    block.sync();  // the stage before, and what shares its memory, may still be read
    KFAC_UNROLL
    for (int32_t at = block.thread(); at < kSaliencyDepth * kSaliencyEdge; at += kSaliencyThreads) {
      const int32_t row = first + at / kSaliencyEdge, column = at % kSaliencyEdge;
      const bool inside = row < job.outputs;
      memory.G[at] = inside && output + column < job.outputs ? from.G[row * job.G_stride + output + column] : 0.0f;
      memory.V[at] = inside && column < from.columns ? from.weight[row * job.weight_stride + column] : 0.0f;
    }
    block.sync();
    KFAC_UNROLL
    for (int k = 0; k < kSaliencyDepth; ++k) {
      KFAC_UNROLL
      for (int i = 0; i < kSaliencyPer; ++i) {
        KFAC_UNROLL
        for (int j = 0; j < kSaliencyPer; ++j) {
          sums[i][j] += memory.G[k * kSaliencyEdge + y + i] * memory.V[k * kSaliencyEdge + x + j];
        }
      }
    }
  }
  KFAC_UNROLL
  for (int i = 0; i < kSaliencyPer; ++i) {
    KFAC_UNROLL
    for (int j = 0; j < kSaliencyPer; ++j) memory.product[(y + i) * kSaliencyPitch + x + j] = sums[i][j];
  }
}

// forms <- lower triangles of V_J^T G V_J of all neurons of the tile, summed in double.
template <class Block>
KFAC_DEVICE void obd_forms(Block& block, const SaliencyJob& job, const SaliencyWork& work, const SaliencyOperands& from,
                           const SaliencyMemory& memory) {
  double sums[kSaliencyPairsPer] = {};
  SaliencyPair pairs[kSaliencyPairsPer];
  const int32_t count = work.count * work.pairs;
  KFAC_UNROLL
  for (int p = 0; p < kSaliencyPairsPer; ++p) {
    const int32_t at = block.thread() + p * kSaliencyThreads;
    pairs[p] = at < count ? saliency_pair(job, work, at) : SaliencyPair{0, 0};
  }
  for (int32_t output = 0; output < job.outputs; output += kSaliencyEdge) {
    multiply_G(block, job, from, output, memory);
    for (int32_t at = block.thread(); at < kSaliencyEdge * kSaliencyEdge; at += kSaliencyThreads) {
      const int32_t row = at / kSaliencyEdge, column = at % kSaliencyEdge;
      const bool inside = output + row < job.outputs && column < work.columns;
      memory.weight[row * kSaliencyPitch + column] =
          inside ? from.weight[(output + row) * job.weight_stride + column] : 0.0f;
    }
    block.sync();
    KFAC_UNROLL
    for (int p = 0; p < kSaliencyPairsPer; ++p) {
      if (block.thread() + p * kSaliencyThreads >= count) break;
      const float* const left = memory.weight + pairs[p].row;
      const float* const right = memory.product + pairs[p].column;
      for (int row = 0; row < kSaliencyEdge; ++row) {
        sums[p] += double(left[row * kSaliencyPitch]) * right[row * kSaliencyPitch];
      }
    }
  }
  block.sync();  // everyone is done with the rows
  KFAC_UNROLL
  for (int p = 0; p < kSaliencyPairsPer; ++p) {
    const int32_t at = block.thread() + p * kSaliencyThreads;
    if (at >= count) break;
    memory.forms[at] = sums[p];
    memory.inputs[at] = from.input[pairs[p].row * job.input_stride + pairs[p].column];
  }
  block.sync();
}

// 1/2 tr(F A_JJ), a warp a neuron.
template <class Block>
KFAC_DEVICE void obd_traces(Block& block, const SaliencyJob& job, const SaliencyWork& work,
                            const SaliencyMemory& memory, float* scores) {
  for (int32_t neuron = block.thread() / 32; neuron < work.count; neuron += kSaliencyWarps) {
    double trace = 0.0;
    for (int32_t at = block.thread() % 32; at < work.pairs; at += 32) {
      const TilePair pair = tile_pair(at, job.block, true);
      const int32_t entry = neuron * work.pairs + at;
      trace += (pair.i == pair.j ? 1.0 : 2.0) * memory.forms[entry] * memory.inputs[entry];
    }
    trace = warp_sum(block, trace);
    if (block.thread() % 32 == 0) scores[work.first + neuron] = float(0.5 * trace);
  }
}

// Eliminates row and column `pivot` of H = L D L^T and carries F along to L^-1 F L^-T: lanes take the entries behind.
template <class Block>
KFAC_DEVICE void eliminate(Block& block, int32_t size, int32_t pivot, double* F, double* H) {
  const int32_t first = pivot + 1, rest = size - first;
  const auto at = [](int32_t row, int32_t column) { return row * (row + 1) / 2 + column; };
  const double p = H[at(pivot, pivot)], form = F[at(pivot, pivot)];
  for (int32_t number = block.thread() % 32; number < rest * (rest + 1) / 2; number += 32) {
    const TilePair pair = tile_pair(number, rest, true);
    const int32_t i = first + pair.i, j = first + pair.j;
    const double left = H[at(i, pivot)] / p, right = H[at(j, pivot)] / p;
    H[at(i, j)] -= left * H[at(j, pivot)];
    F[at(i, j)] += left * right * form - left * F[at(j, pivot)] - right * F[at(i, pivot)];
  }
}

// 1/2 tr(F (H_JJ)^-1) = 1/2 tr(L^-1 F L^-T D^-1), a warp a neuron; flags[neuron]: whether H_JJ is not positive
// definite.
template <class Block>
KFAC_DEVICE void obs_traces(Block& block, const SaliencyJob& job, const SaliencyWork& work,
                            const SaliencyMemory& memory, float* scores, int32_t* flags) {
  for (int32_t first = 0; first < work.count; first += kSaliencyWarps) {
    const int32_t neuron = first + block.thread() / 32;
    const bool present = neuron < work.count;
    double* const F = memory.forms + neuron * work.pairs;
    double* const H = memory.inputs + neuron * work.pairs;
    double trace = 0.0;
    bool failed = false;
    for (int32_t pivot = 0; pivot < job.block; ++pivot) {
      if (present) {
        const int32_t corner = pivot * (pivot + 3) / 2;
        failed = failed || !(H[corner] > 0.0 && H[corner] - H[corner] == 0.0);
        trace += F[corner] / H[corner];
        eliminate(block, job.block, pivot, F, H);
      }
      block.sync();
    }
    if (!present || block.thread() % 32 != 0) continue;
    scores[work.first + neuron] = failed ? bits_float(0x7fc00000u) : float(0.5 * trace);
    flags[job.first_neuron + work.first + neuron] = failed;
  }
}

template <Saliency kKind, class Block>
KFAC_DEVICE void saliency(Block& block, const JobList<SaliencyJob>& list, const SaliencyPointers& pointers,
                          int32_t* flags) {
  const SaliencyMemory memory = saliency_memory(block.shared());
  int32_t number = 0;
  for (int32_t tile = block.index(); tile < list.tiles; tile += block.count()) {
    number = job_of_tile(list.first, number, tile);
    const SaliencyJob& job = list.jobs[number];
    const SaliencyWork work = saliency_work(job, tile - list.first[number]);
    const SaliencyOperands from{pointers.weight[job.place] + work.first_column,
                                pointers.input[job.place] + work.first_column * (job.input_stride + 1),
                                pointers.G[job.place], work.columns};
    obd_forms(block, job, work, from, memory);
    if constexpr (kKind == Saliency::kObs) {
      obs_traces(block, job, work, memory, pointers.scores[job.place], flags);
    } else {
      obd_traces(block, job, work, memory, pointers.scores[job.place]);
    }
  }
}

}  // namespace kfac
