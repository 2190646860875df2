// lanes: sums over rows of single columns; reduce: chunks added up in order.
#pragma once

#include "kfac/covariance_group.h"

namespace kfac {

// The sum of every eighth row of a column, from `first` on.
template <DType kDType>
KFAC_DEVICE float sum_rows(const LaneJob& job, uint32_t first, uint32_t end, const void* packed, int32_t column) {
  const auto value = [&](int64_t row) {
    return element_of(load_bits(packed, kDType, row * job.row_pitch + column), kDType);
  };
  float sum = 0.0f;
  for (uint32_t k = first; k < end; k += kLaneRows) {
    const int64_t row = region_row(job.rows, k);
    sum += job.product ? value(row) * value(row + job.rows.shift) : value(row);
  }
  return sum;
}

// A tile is 32 columns of one chunk: 8 threads a column take every eighth row, and are added in order.
template <class Block>
KFAC_DEVICE void lane_tile(Block& block, const LaneJob& job, int32_t tile, float* workspace) {
  float* const sums = block.shared();  // [kLaneRows][kLaneColumns]
  const int32_t blocks = int32_t(divide_up(job.row_pitch, kLaneColumns));
  const int32_t chunk = tile / blocks, lane = block.thread() % kLaneColumns;
  const int32_t column = tile % blocks * kLaneColumns + lane;
  const uint32_t first = uint32_t(chunk) * job.chunk, end = smaller(first + job.chunk, job.rows.count);
  const void* const packed = workspace + job.packed;
  const uint32_t own = first + block.thread() / kLaneColumns;
  float sum = 0.0f;
  if (column < job.row_pitch) {
    switch (job.packed_dtype) {
      case DType::kBFloat16:
        sum = sum_rows<DType::kBFloat16>(job, own, end, packed, column);
        break;
      case DType::kFloat16:
        sum = sum_rows<DType::kFloat16>(job, own, end, packed, column);
        break;
      default:
        sum = sum_rows<DType::kFloat32>(job, own, end, packed, column);
    }
  }
  block.sync();
  sums[block.thread()] = sum;
  block.sync();
  if (block.thread() >= kLaneColumns || column >= job.row_pitch) return;
  float total = sums[lane];
  for (int line = 1; line < kLaneRows; ++line) total += sums[line * kLaneColumns + lane];
  workspace[job.slot + int64_t(chunk) * job.row_pitch + column] = total;
}

template <class Block>
KFAC_DEVICE void covariance_lanes(Block& block, const JobList<LaneJob>& list, float* workspace) {
  int32_t number = 0;
  for (int32_t tile = block.index(); tile < list.tiles; tile += block.count()) {
    number = job_of_tile(list.first, number, tile);
    const LaneJob job = list.jobs[number];
    lane_tile(block, job, tile - list.first[number], workspace);
  }
}

template <class Block>
KFAC_DEVICE void covariance_reduce(Block& block, const JobList<ReduceJob>& list, float* workspace) {
  int32_t number = 0;
  for (int32_t tile = block.index(); tile < list.tiles; tile += block.count()) {
    number = job_of_tile(list.first, number, tile);
    const ReduceJob job = list.jobs[number];
    const int64_t at = int64_t(tile - list.first[number]) * kReduceElements + block.thread() * 4;
    if (at >= job.length) continue;
    float* const slot = workspace + job.slot + at;
    float sum[4] = {slot[0], slot[1], slot[2], slot[3]};
    for (int32_t chunk = 1; chunk < job.chunks; ++chunk) {
      const float* const other = slot + chunk * job.length;
      KFAC_UNROLL
      for (int e = 0; e < 4; ++e) sum[e] += other[e];
    }
    KFAC_UNROLL
    for (int e = 0; e < 4; ++e) slot[e] = sum[e];
  }
}

}  // namespace kfac
