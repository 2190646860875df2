// pack: a layer's input, whatever its strides and dtype -> rows [pixel][sample][column] of floats, or of its halves.
#pragma once

#include "kfac/covariance_group.h"

namespace kfac {

// The bits of what a column's kernel position meets at output (y, x) of its channel; 0 in the padding.
KFAC_DEVICE uint32_t patch_bits(const PackJob& job, const void* image, int32_t sample, PackedColumn column, int32_t y,
                                int32_t x) {
  const int32_t row = y * job.conv_stride_h + column.tap_y * job.dilation_h - job.pad_top;
  const int32_t col = x * job.conv_stride_w + column.tap_x * job.dilation_w - job.pad_left;
  if (row < 0 || row >= job.height || col < 0 || col >= job.width) return 0;
  return load_bits(image, job.dtype,
                   sample * job.stride_n + column.channel * job.stride_c + row * job.stride_h + col * job.stride_w);
}

KFAC_DEVICE float patch_value(const PackJob& job, const void* image, int32_t sample, PackedColumn column, int32_t y,
                              int32_t x) {
  return element_of(patch_bits(job, image, sample, column, y, x), job.dtype);
}

KFAC_DEVICE uint32_t packed_bits(const PackJob& job, float value) {
  return job.round_to_tf32 ? round_to_tf32(value) : float_bits(value);
}

// A tile of positions (sample by sample, as they lie in memory) and columns; each thread has kPackSteps of its entries.
constexpr int kPackLines = kBlockThreads / 32, kPackSteps = 32 / kPackLines;

struct PackTile {
  int32_t first, positions, column;  // the first position, how many are left from there on, the first column
};

// Entries (lane, line + k kPackLines): columns of one position where those lie side by side in memory, else positions
// of one column; what a lane's entries have in common is found once.
template <class Block>
KFAC_DEVICE void read_tile(Block& block, const PackJob& job, const void* image, const PackTile& tile,
                           uint32_t (&bits)[kPackSteps]) {
  const int32_t lane = block.thread() % 32, line = block.thread() / 32;
  if (job.lanes_along_columns) {
    const PackedColumn column = packed_column(job, tile.column + lane);
    KFAC_UNROLL
    for (int k = 0; k < kPackSteps; ++k) {
      const int32_t at = line + k * kPackLines;
      const PackedPosition position = packed_position(job, tile.first + at);
      const bool inside = column.valid && at < tile.positions;
      bits[k] = inside ? patch_bits(job, image, position.sample, column, position.y, position.x) : 0;
    }
    return;
  }
  const PackedPosition position = packed_position(job, tile.first + lane);
  KFAC_UNROLL
  for (int k = 0; k < kPackSteps; ++k) {
    const PackedColumn column = packed_column(job, tile.column + line + k * kPackLines);
    const bool inside = column.valid && lane < tile.positions;
    bits[k] = inside ? patch_bits(job, image, position.sample, column, position.y, position.x) : 0;
  }
}

// One tile, turned in shared memory so that both reads and writes run along memory.
template <class Block>
KFAC_DEVICE void pack_tile(Block& block, const PackJob& job, const void* image, int32_t number, float* workspace) {
  constexpr int kPitch = kPackColumns + 1;
  uint32_t* const values = reinterpret_cast<uint32_t*>(block.shared());  // [position][column]
  uint32_t* const rows = values + kPackPositions * kPitch;               // where positions go
  const bool halves = job.packed_dtype != DType::kFloat32;
  const int32_t line_of_tiles = job.column_tiles.quotient(number), first = line_of_tiles * kPackPositions;
  const PackTile tile{first, packed_rows(job) - first,
                      (number - line_of_tiles * int32_t(job.column_tiles.divisor)) * kPackColumns};
  const int32_t lane = block.thread() % 32, line = block.thread() / 32;
  uint32_t bits[kPackSteps];
  read_tile(block, job, image, tile, bits);
  block.sync();  // the tile before may still be read
  KFAC_UNROLL
  for (int k = 0; k < kPackSteps; ++k) {
    const int32_t step = line + k * kPackLines;
    const int32_t at = job.lanes_along_columns ? step : lane, entry = job.lanes_along_columns ? lane : step;
    values[at * kPitch + entry] = halves ? bits[k] : packed_bits(job, element_of(bits[k], job.dtype));
  }
  if (line == 0) {
    const PackedPosition position = packed_position(job, tile.first + lane);
    rows[lane] = packed_row(job, position.sample, position.pixel);
  }
  block.sync();
  const int32_t column = tile.column + lane;
  if (column >= job.row_pitch) return;
  KFAC_UNROLL
  for (int k = 0; k < kPackSteps; ++k) {
    const int32_t at = line + k * kPackLines;
    if (at >= tile.positions) continue;
    store_bits(workspace + job.packed, job.packed_dtype, int64_t(rows[at]) * job.row_pitch + column,
               values[at * kPitch + lane]);
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
  store_bits(workspace + job.packed, DType::kFloat32, int64_t(sample) * job.row_pitch + index,
             packed_bits(job, total / float(positions)));
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
