// pack: a layer's input, whatever its strides and dtype -> rows [pixel][sample][column] of floats.
#pragma once

#include "kfac/covariance_group.h"

namespace kfac {

// What a column's kernel position meets at output (y, x) of its channel; 0 in the padding.
KFAC_DEVICE float patch_value(const PackJob& job, const void* image, int32_t sample, PackedColumn column, int32_t y,
                              int32_t x) {
  const int32_t row = y * job.conv_stride_h + column.tap_y * job.dilation_h - job.pad_top;
  const int32_t col = x * job.conv_stride_w + column.tap_x * job.dilation_w - job.pad_left;
  if (row < 0 || row >= job.height || col < 0 || col >= job.width) return 0.0f;
  return load_element(image, job.dtype,
                      sample * job.stride_n + column.channel * job.stride_c + row * job.stride_h + col * job.stride_w);
}

KFAC_DEVICE float stored(const PackJob& job, float value) {
  return job.round_to_tf32 ? bits_float(round_to_tf32(value)) : value;
}

// One tile of 32 positions (sample by sample, as they lie in memory) and 32 columns, turned in shared memory so that
// both reads and writes run along memory.
template <class Block>
KFAC_DEVICE void pack_tile(Block& block, const PackJob& job, const void* image, int32_t tile, float* workspace) {
  constexpr int kPitch = kPackColumns + 1;
  float* const values = block.shared();  // [position][column]
  const int32_t line_of_tiles = job.column_tiles.quotient(tile), rows = packed_rows(job);
  const int32_t first = line_of_tiles * kPackPositions;
  const int32_t column_start = (tile - line_of_tiles * int32_t(job.column_tiles.divisor)) * kPackColumns;
  const int32_t lane = block.thread() % 32, line = block.thread() / 32;
  block.sync();
  for (int32_t step = line; step < 32; step += kBlockThreads / 32) {
    const int32_t at = job.lanes_along_columns ? step : lane, entry = job.lanes_along_columns ? lane : step;
    const PackedColumn column = packed_column(job, column_start + entry);
    float value = 0.0f;
    if (column.valid && at < rows - first) {
      const PackedPosition position = packed_position(job, first + at);
      value = patch_value(job, image, position.sample, column, position.y, position.x);
    }
    values[at * kPitch + entry] = stored(job, value);
  }
  block.sync();
  float* const packed = workspace + job.packed;
  for (int32_t at = line; at < kPackPositions; at += kBlockThreads / 32) {
    if (at >= rows - first || column_start + lane >= job.row_pitch) continue;
    const PackedPosition position = packed_position(job, first + at);
    packed[packed_row(job, position.sample, position.pixel) * job.row_pitch + column_start + lane] =
        values[at * kPitch + lane];
  }
}

// Patches averaged over positions: a warp adds one entry of one sample.
template <class Block>
KFAC_DEVICE void mean_tile(Block& block, const PackJob& job, const void* image, int32_t tile, float* workspace) {
  float* const sums = block.shared();  // [warp][lane]
  const int32_t lane = block.thread() % 32, warp = block.thread() / 32;
  const int64_t number = int64_t(tile) * kMeansPerTile + warp;
  const int32_t sample = int32_t(number / job.row_pitch), index = int32_t(number % job.row_pitch);
  const PackedColumn column = packed_column(job, index);
  const int32_t positions = job.out_h * job.out_w;
  float sum = 0.0f;
  if (sample < job.samples && column.valid) {
    for (int32_t at = lane; at < positions; at += 32) {
      const int32_t y = job.output_w.quotient(at);
      sum += patch_value(job, image, sample, column, y, at - y * job.out_w);
    }
  }
  block.sync();
  sums[block.thread()] = sum;
  block.sync();
  if (lane != 0 || sample >= job.samples) return;
  float total = 0.0f;
  for (int32_t l = 0; l < 32; ++l) total += sums[block.thread() + l];
  workspace[job.packed + int64_t(sample) * job.row_pitch + index] = stored(job, total / float(positions));
}

template <class Block>
KFAC_DEVICE void covariance_pack(Block& block, const JobList<PackJob>& list, const PackPointers& pointers,
                                 float* workspace) {
  int32_t number = 0;
  for (int32_t tile = block.index(); tile < list.tiles; tile += block.count()) {
    number = job_of_tile(list.first, number, tile);
    const PackJob job = list.jobs[number];  // a copy: kept while values are stored
    pack_tile(block, job, pointers.image[job.layer], tile - list.first[number], workspace);
  }
}

template <class Block>
KFAC_DEVICE void covariance_means(Block& block, const JobList<PackJob>& list, const PackPointers& pointers,
                                  float* workspace) {
  int32_t number = 0;
  for (int32_t tile = block.index(); tile < list.tiles; tile += block.count()) {
    number = job_of_tile(list.first, number, tile);
    const PackJob job = list.jobs[number];  // a copy: kept while values are stored
    mean_tile(block, job, pointers.image[job.layer], tile - list.first[number], workspace);
  }
}

}  // namespace kfac
