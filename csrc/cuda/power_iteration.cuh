// Power iteration of many matrices, all iterations in one launch; who does what: kfac/power_iteration_group.h
#pragma once

#include "block_sum.cuh"
#include "kfac/power_iteration_group.h"

namespace kfac {

template <int kCount, class Block>
KFAC_DEVICE void power_sum(Block& block, double (&values)[kCount]) {
  static_assert(kCount <= kPowerMoments, "");
  block_sum<kPowerThreads>(block, reinterpret_cast<double*>(block.shared()), values);
}

// 1 + cos(1 + 1.7 i) / 2, as kfac/power_iteration.h: no natural eigenvector is orthogonal to it.
KFAC_DEVICE float start_entry(int32_t i) {
  const double turns = (1.0 + 1.7 * i) * 0.15915494309189535;  // of 2 pi
  const float part = float(turns - floor(turns));
#ifdef __CUDA_ARCH__
  return 1.0f + 0.5f * cospif(2.0f * part);
#else
  return 1.0f + 0.5f * float(cos(2.0 * 3.141592653589793 * part));
#endif
}

// v <- the start in unit length, or the default where that is zero or not finite. Every block of a team does the same.
template <class Block>
KFAC_DEVICE void load_start(Block& block, const EigenJob& job, const float* start, float* v) {
  double sum[1] = {0.0};
  for (int32_t i = block.thread(); i < job.n; i += kPowerThreads) sum[0] += double(start[i]) * start[i];
  power_sum(block, sum);
  const bool usable = sum[0] > 0.0 && is_finite(sum[0]);
  if (!usable) {
    sum[0] = 0.0;
    for (int32_t i = block.thread(); i < job.n; i += kPowerThreads) sum[0] += double(start_entry(i)) * start_entry(i);
    power_sum(block, sum);
  }
  const UnitScale scale = unit_scale(sqrt(sum[0]));
  for (int32_t i = block.thread(); i < job.n; i += kPowerThreads) {
    v[i] = (usable ? start[i] : start_entry(i)) * scale.power * scale.rest;
  }
}

// What a block multiplies: its first `kept` rows from shared memory, the others from the matrix.
struct OwnRows {
  RowRange range;
  int32_t kept;
  const float* matrix;  // row range.first
  float* memory;        // [kept][n]
};

template <class Block>
KFAC_DEVICE OwnRows keep_rows(Block& block, const EigenJob& job, const float* matrix, int32_t rank,
                              int32_t shared_floats) {
  const RowRange range = team_rows(job, rank);
  const OwnRows rows{range, kept_rows(job, range, shared_floats), matrix + range.first * job.stride,
                     block.shared() + power_rows_offset(job.n, job.blocks == 1)};
  for (int32_t row = block.thread() / 32; row < rows.kept; row += kPowerWarps) {
    const float* const from = rows.matrix + row * job.stride;
    for (int32_t j = block.thread() % 32; j < job.n; j += 32) rows.memory[int64_t(row) * job.n + j] = from[j];
  }
  return rows;
}

// image[own rows] <- A v, and what they add to the moments.
template <class Block>
KFAC_DEVICE void multiply_rows(Block& block, const EigenJob& job, const OwnRows& rows, const float* v, float* image,
                               double (&moments)[kPowerMoments]) {
  const int32_t lane = block.thread() % 32, warp = block.thread() / 32, n = job.n;
  for (int32_t first = warp * kPowerRows; first < rows.range.count; first += kPowerWarps * kPowerRows) {
    const float* row[kPowerRows];
    float sum[kPowerRows] = {};
    KFAC_UNROLL
    for (int r = 0; r < kPowerRows; ++r) {  // beyond the last row: that row again
      const int32_t at = smaller(first + r, rows.range.count - 1);
      row[r] = at < rows.kept ? rows.memory + int64_t(at) * n : rows.matrix + at * job.stride;
    }
    KFAC_UNROLL_BY(4)
    for (int32_t j = lane; j < n; j += 32) {
      const float entry = v[j];
      KFAC_UNROLL
      for (int r = 0; r < kPowerRows; ++r) sum[r] += row[r][j] * entry;
    }
    KFAC_UNROLL
    for (int r = 0; r < kPowerRows; ++r) {
      sum[r] = warp_sum(block, sum[r]);
      const int32_t at = rows.range.first + first + r;
      if (lane != r || first + r >= rows.range.count) continue;
      image[at] = sum[r];
      moments[0] += double(v[at]) * v[at];
      moments[1] += double(v[at]) * sum[r];
      moments[2] += double(sum[r]) * sum[r];
    }
  }
}

// Adds the moments of all blocks of the team; waits until everyone's rows of A v are there.
template <class Block>
KFAC_DEVICE void team_sum(Block& block, const EigenJob& job, int32_t rank, int32_t iteration, float* workspace,
                          double (&moments)[kPowerMoments]) {
  power_sum(block, moments);
  if (job.blocks == 1) return;
  double* const sums = reinterpret_cast<double*>(workspace + job.moments) + iteration % 2 * job.blocks * kPowerMoments;
  if (block.thread() < kPowerMoments) {
    const double own = block.thread() == 0 ? moments[0] : block.thread() == 1 ? moments[1] : moments[2];
    sums[rank * kPowerMoments + block.thread()] = own;
  }
  block.meet(reinterpret_cast<uint32_t*>(workspace + job.arrived), uint32_t(iteration) * uint32_t(job.blocks));
  KFAC_UNROLL
  for (int i = 0; i < kPowerMoments; ++i) {
    moments[i] = 0.0;
    for (int32_t b = block.thread(); b < job.blocks; b += kPowerThreads) moments[i] += sums[b * kPowerMoments + i];
  }
  power_sum(block, moments);
}

struct EigenState {
  double value, residual;
  UnitScale scale;  // A v times this has length one
  bool moves, done;
};

// lambda = v.Av / v.v and |A v - lambda v| / |lambda v|; the moments are sums in double of floats, so their difference
// is good to 1e-8 of |A v|.
KFAC_DEVICE EigenState judge(const double (&moments)[kPowerMoments], double tol) {
  EigenState state{};
  const double square = moments[2];
  if (!is_finite(square) || square == 0.0) {
    state.value = state.residual = square == 0.0 ? 0.0 : square - square;  // NaN where the matrix is not finite
    state.done = true;
    return state;
  }
  state.value = moments[1] / moments[0];
  const double rest = square - state.value * moments[1];
  state.residual = sqrt(rest > 0.0 ? rest : 0.0) / (fabs(state.value) * sqrt(moments[0]));
  state.scale = unit_scale(sqrt(square));
  state.moves = true;
  state.done = state.residual <= tol;
  return state;
}

template <class Block>
KFAC_DEVICE void power_iterate(Block& block, const EigenJob& job, const PowerPointers& pointers,
                               const PowerMethod& method, int32_t shared_floats, float* workspace,
                               const PowerResults& results) {
  const int32_t rank = block.index() - job.first_block;
  float* const v = block.shared() + kPowerSumFloats;
  block.sync();  // the job before may still be read
  load_start(block, job, pointers.vector[job.place], v);
  const OwnRows rows = keep_rows(block, job, pointers.matrix[job.place], rank, shared_floats);
  EigenState state{};
  int32_t iteration = 0;
  do {
    ++iteration;
    // a block is at most one barrier ahead of another, so two buffers are enough
    float* const image = job.blocks == 1 ? v + job.n : workspace + job.images + iteration % 2 * int64_t(job.n);
    double moments[kPowerMoments] = {};
    block.sync();  // v is there
    multiply_rows(block, job, rows, v, image, moments);
    team_sum(block, job, rank, iteration, workspace, moments);
    state = judge(moments, method.tol);
    if (!state.moves) break;
    for (int32_t i = block.thread(); i < job.n; i += kPowerThreads)
      v[i] = image[i] * state.scale.power * state.scale.rest;
  } while (!state.done && iteration < method.max_iter);
  block.sync();
  for (int32_t i = block.thread(); i < rows.range.count; i += kPowerThreads) {
    pointers.vector[job.place][rows.range.first + i] = v[rows.range.first + i];
  }
  if (rank != 0 || block.thread() != 0) return;
  results.values[job.place] = float(state.value);
  results.residuals[job.place] = float(state.residual);
  results.iterations[job.place] = iteration;
}

template <class Block>
KFAC_DEVICE void power_iteration(Block& block, const PowerSchedule& schedule, const PowerPointers& pointers,
                                 const PowerMethod& method, float* workspace, const PowerResults& results) {
  const int32_t end = schedule.first[block.index() + 1];
  for (int32_t at = schedule.first[block.index()]; at < end; ++at) {
    power_iterate(block, schedule.jobs[schedule.list[at]], pointers, method, schedule.shared_floats, workspace,
                  results);
  }
}

}  // namespace kfac
