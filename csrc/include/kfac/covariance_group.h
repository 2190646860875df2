// Covariances of many layers in a few launches: descriptors, tile schedule, chunks, slots and the order of every sum.
//
// Plain data and index maps only. csrc/cuda/*.cuh are the kernels that follow this schedule; tests/native runs the same
// kernels on the CPU.
//
// pack    every layer's input -> rows [pixel][sample][column] (columns: channels, or patch entries), of halves where
//         these are the inputs themselves, else of floats
// tiles   for each region of the shift plan, tile of columns and chunk of rows: P[rows]^T P[rows + shift] -> a slot, or
//         two that lie side by side from a wide tile
// lanes   the same for single columns: column sums (for the bias) and depthwise products
// reduce  the slots of all chunks are added to that of the first, in order
// expand  regions -> both triangles of out <- decay out + scale A, bias row included
#pragma once

#include <cmath>
#include <vector>

#include "kfac/covariance.h"
#include "kfac/device.h"
#include "kfac/tile_shape.h"

namespace kfac {

constexpr int kMaxGroupLayers = 128;  // their pointers travel as kernel parameters, of which there are 4 KB

// kFloat32: as exact as a float32 product. kTf32: inputs rounded to 10 bits of mantissa.
enum class Precision : int { kFloat32 = 0, kTf32 = 1 };

struct CovarianceProblem {
  DType dtype;  // kFloat32, kBFloat16 or kFloat16
  int64_t stride_n, stride_c, stride_h, stride_w;
  ConvShape shape;
  CovarianceMode mode;
  CovarianceAlgorithm algorithm;
  bool bias;
  Precision precision;
};

// How the matrix units multiply.
enum class MmaMode : int {
  kTf32 = 0,      // inputs are rounded while packing; sums stay in the matrix unit for a chunk
  kBFloat16 = 1,  // inputs as they are, exact products; every 16 rows are added in float32 outside of the matrix unit
  kSplit = 2,     // inputs are cut into two tf32 numbers, three products; every 8 rows are added outside
  kFloat16 = 3,   // as kBFloat16
};
constexpr int kMmaModes = 4;

// What rows are packed as for a mode.
KFAC_HD constexpr DType packed_dtype(MmaMode mode) {
  return mode == MmaMode::kBFloat16 ? DType::kBFloat16 : mode == MmaMode::kFloat16 ? DType::kFloat16 : DType::kFloat32;
}

// ---- pack ----------------------------------------------------------------------------------------------------------

enum class PackKind : int { kImage = 0, kPatches = 1, kMeans = 2 };

// A packed row holds `groups` times `group_pitch` columns, of which `group_columns` are the group's and the rest zero.
struct PackJob {
  int32_t layer;
  PackKind kind;
  DType dtype, packed_dtype;
  int32_t round_to_tf32, lanes_along_columns;
  int64_t stride_n, stride_c, stride_h, stride_w;
  int32_t samples, height, width;  // the image
  Divider pixel_width, pixels;     // positions of a sample that become rows
  Divider kernel_w, taps;          // taps = 1 for kImage
  int32_t conv_stride_h, conv_stride_w, pad_top, pad_left, dilation_h, dilation_w, out_h, out_w;
  int32_t group_columns, group_channels, row_pitch;
  Divider group_pitch, output_w, column_tiles;
  int64_t packed;  // offset in the workspace, in floats
};

KFAC_HD int32_t packed_rows(const PackJob& job) {
  return job.samples * int32_t(job.pixels.divisor);
}

// How to gather every patch of a problem as a row, whichever way CovarianceGroup chooses.
PackJob patch_job(const CovarianceProblem& problem);

constexpr int kPackPositions = 32, kPackColumns = 32;                      // a tile of pack
constexpr int kPackSharedBytes = 4 * kPackPositions * (kPackColumns + 2);  // a column for the rows' numbers
constexpr int kMeansPerTile = kBlockThreads / 32;                          // a warp each
constexpr int kLineSharedBytes = 4 * kBlockThreads;                        // of means and of lanes: one float a thread

KFAC_HD int64_t pack_tiles(const PackJob& job) {
  if (job.kind == PackKind::kMeans) return divide_up(int64_t(job.samples) * job.row_pitch, kMeansPerTile);
  return divide_up(packed_rows(job), kPackPositions) * job.column_tiles.divisor;
}

// What a packed column is: a tap of a channel, or padding.
struct PackedColumn {
  int32_t channel, tap_y, tap_x;
  bool valid;
};

KFAC_HD PackedColumn packed_column(const PackJob& job, int32_t column) {
  const int32_t group = job.group_pitch.quotient(column), entry = column - group * job.group_pitch.divisor;
  const int32_t channel = job.taps.quotient(entry), tap = entry - channel * job.taps.divisor;
  const int32_t tap_y = job.kernel_w.quotient(tap);
  return {group * job.group_channels + channel, tap_y, tap - tap_y * int32_t(job.kernel_w.divisor),
          column < job.row_pitch && entry < job.group_columns};
}

// The pixels of a sample that become rows, numbered as they lie in memory; y and x are output positions of kPatches.
struct PackedPosition {
  int32_t sample, pixel, y, x;
};

KFAC_HD PackedPosition packed_position(const PackJob& job, int32_t position) {
  const int32_t sample = job.pixels.quotient(position), pixel = position - sample * job.pixels.divisor;
  const int32_t y = job.pixel_width.quotient(pixel);
  return {sample, pixel, y, pixel - y * int32_t(job.pixel_width.divisor)};
}

// Rows are ordered by pixel, then sample: a shift by pixels is a shift by rows, the same for every sample.
KFAC_HD uint32_t packed_row(const PackJob& job, int32_t sample, int32_t pixel) {
  return uint32_t(pixel) * uint32_t(job.samples) + uint32_t(sample);
}

// ---- rows of a region ----------------------------------------------------------------------------------------------

// Row k of a region, k < count, is start + k / inner / middle outer_stride + k / inner % middle middle_stride + k %
// inner; its partner lies `shift` rows further.
struct RegionRows {
  uint32_t count, middle_stride, outer_stride, start;
  int32_t shift;
  Divider inner, middle;
};

KFAC_HD uint32_t region_row(const RegionRows& rows, uint32_t k) {
  const uint32_t run = rows.inner.quotient(k), outer = rows.middle.quotient(run);
  return rows.start + outer * rows.outer_stride + (run - outer * rows.middle.divisor) * rows.middle_stride +
         (k - run * rows.inner.divisor);
}

// Long sums in float32 drift: no chunk has more rows than this.
constexpr int64_t kChunkRows = 2048;

// Equal chunks, a multiple of `step` rows each (but the last).
KFAC_HD uint32_t chunk_rows(uint32_t rows, uint32_t step) {
  const int64_t chunks = divide_up(rows, kChunkRows);
  return uint32_t(align_up(divide_up(int64_t(rows), chunks), int64_t(step)));
}

// ---- tiles ---------------------------------------------------------------------------------------------------------

KFAC_HD int32_t tile_edge_bits(int64_t columns) {
  return columns >= 128 ? 7 : columns > 32 ? 6 : 5;
}

KFAC_HD int32_t stage_rows(int32_t edge, DType packed) {
  const int32_t rows = edge == 128  ? TileShape<128>::kStageRows
                       : edge == 64 ? TileShape<64>::kStageRows
                                    : TileShape<32>::kStageRows;
  return packed == DType::kFloat32 ? rows : 2 * rows;
}

// What a job computes of the squares (i, j) of a product, j <= i if symmetric: all, two at a time (j even, and j + 1),
// or those that are left.
enum class TilePart : int { kAll = 0, kWide = 1, kRest = 2 };

// One region of one layer: its tiles are ordered by chunk, group, pair of column tiles (i, j).
struct TileJob {
  RegionRows rows;
  uint32_t chunk;
  TilePart part;
  int32_t edge, groups, pairs, side, symmetric;  // pairs: of the part; side: squares along an edge of the product
  int32_t group_pitch, row_pitch;
  int64_t packed, slot;  // offsets in the workspace
};

struct TilePair {
  int32_t i, j;
};

KFAC_HD TilePair tile_pair(int32_t pair, int32_t side, bool symmetric) {
  if (!symmetric) return {pair / side, pair % side};
  int32_t i = int32_t((sqrtf(8.0f * float(pair) + 1.0f) - 1.0f) / 2.0f);
  while (i * (i + 1) / 2 > pair) --i;
  while ((i + 1) * (i + 2) / 2 <= pair) ++i;
  return {i, pair - i * (i + 1) / 2};
}

KFAC_HD int32_t pair_count(int32_t side, bool symmetric) {
  return symmetric ? side * (side + 1) / 2 : side * side;
}

KFAC_HD int32_t pair_number(int32_t i, int32_t j, int32_t side, bool symmetric) {
  return symmetric ? i * (i + 1) / 2 + j : i * side + j;
}

KFAC_HD int32_t part_count(TilePart part, int32_t side, bool symmetric) {
  if (part == TilePart::kAll) return pair_count(side, symmetric);
  if (part == TilePart::kWide) return symmetric ? side * side / 4 : side * (side / 2);
  return symmetric ? (side + 1) / 2 : side % 2 * side;
}

KFAC_HD TilePair part_pair(TilePart part, int32_t number, int32_t side, bool symmetric) {
  if (part == TilePart::kAll) return tile_pair(number, side, symmetric);
  if (part == TilePart::kRest) return symmetric ? TilePair{2 * number, 2 * number} : TilePair{number, side - 1};
  if (!symmetric) return {number / (side / 2), number % (side / 2) * 2};
  int32_t i = int32_t(2.0f * sqrtf(float(number)));  // the rows before i have i^2 / 4
  while (i * i / 4 > number) --i;
  while ((i + 1) * (i + 1) / 4 <= number) ++i;
  return {i, (number - i * i / 4) * 2};
}

struct TileWork {
  uint32_t first_row, end_row;
  int32_t column_a, column_b;  // within the group
  int32_t group, square;       // its first square: of all that the region has
};

KFAC_HD TileWork tile_work(const TileJob& job, int32_t tile) {
  const int32_t number = tile % job.pairs, matrix = tile / job.pairs, group = matrix % job.groups;
  const TilePair at = part_pair(job.part, number, job.side, job.symmetric);
  const int32_t square =
      matrix * pair_count(job.side, job.symmetric) + pair_number(at.i, at.j, job.side, job.symmetric);
  const uint32_t first = uint32_t(matrix / job.groups) * job.chunk;
  return {first, smaller(first + job.chunk, job.rows.count), at.i * job.edge, at.j * job.edge, group, square};
}

KFAC_HD int64_t tile_slot(const TileJob& job, const TileWork& work) {
  return job.slot + int64_t(work.square) * job.edge * job.edge;
}

// ---- lanes ---------------------------------------------------------------------------------------------------------

// Sums over a region's rows of single columns: of P[row][c] P[row + shift][c] if `product`, else of P[row][c].
struct LaneJob {
  RegionRows rows;
  uint32_t chunk;
  DType packed_dtype;
  int32_t row_pitch, product;
  int64_t packed, slot;  // slot [chunks][row_pitch]
};

constexpr int kLaneColumns = 32, kLaneRows = kBlockThreads / kLaneColumns;

// ---- reduce --------------------------------------------------------------------------------------------------------

// slot[0][i] += slot[1][i] + ... + slot[chunks - 1][i], i < length
struct ReduceJob {
  int64_t slot, length;
  int32_t chunks;
};

constexpr int kReduceElements = 4 * kBlockThreads;

// ---- expand --------------------------------------------------------------------------------------------------------

enum class ExpandKind : int { kMatrix = 0, kDepthwise = 1, kBias = 2 };

struct ExpandJob {
  int32_t layer;
  ExpandKind kind;
  int32_t d, groups, channels;    // d includes the bias, channels are a group's
  int32_t edge_bits, side;        // tiles are 2^edge_bits wide, `side` of them along an edge of the [C, C] product
  int32_t tap_block;              // columns (c', q) are written for this many q at a time
  Divider taps, tap_pairs, rows;  // kernel positions, their pairs, d
  Divider blocks, tap_blocks, full_block, last_block;  // of kExpandEdge channels; of q, and how many q each has
  int32_t lane_group_pitch;  // column of (group, channel) in the lanes' slots: group lane_group_pitch + channel
  int32_t terms;             // start in the pool of terms: [taps^2 + 1] offsets, then 2 region + transposed
  int32_t regions;           // start in the list of region slots
  float count;               // rows of all: the corner of the bias row
};

struct RegionSlots {
  int64_t tiles;    // slot of the first chunk of the region's tiles (depthwise: of its lanes)
  int64_t columns;  // slot of its column sums, if it has any
  int32_t symmetric;
};

constexpr int kExpandEdge = 32, kMaxTapBlock = 9;
constexpr int kExpandVectors = kExpandEdge / 4;  // threads that read a line of a block, 16 bytes each
static_assert(kExpandEdge * kExpandVectors == kBlockThreads, "each thread reads once");
KFAC_HD constexpr int expand_pitch(int tap_block) {
  return kExpandEdge * tap_block + 1;
}
constexpr int kExpandSharedBytes = 4 * kExpandEdge * expand_pitch(kMaxTapBlock);
static_assert(kExpandSharedBytes <= 48 << 10, "more needs an attribute of the kernel");

struct ExpandWork {
  int32_t group, i, j, p, q_first, q_count;  // i, j: blocks of kExpandEdge channels
};

KFAC_HD ExpandWork expand_work(const ExpandJob& job, int32_t tile) {
  const auto take = [&](const Divider& divider) {  // the fastest running of the numbers that are left
    const int32_t rest = divider.quotient(tile), number = tile - rest * int32_t(divider.divisor);
    tile = rest;
    return number;
  };
  ExpandWork work;
  work.j = take(job.blocks);
  work.i = take(job.blocks);
  work.p = take(job.taps);
  work.q_first = take(job.tap_blocks) * job.tap_block;
  work.group = tile;
  work.q_count = smaller(job.tap_block, int32_t(job.taps.divisor) - work.q_first);
  return work;
}

// ---- all of it -----------------------------------------------------------------------------------------------------

struct CovarianceSchedule {
  JobList<PackJob> pack, means;
  JobList<TileJob> wide_tiles[kMmaModes], tiles[kMmaModes];
  JobList<LaneJob> lanes;
  JobList<ReduceJob> reduce;
  JobList<ExpandJob> expand;
  const RegionSlots* regions;
  const int32_t* terms;
};

// What changes from call to call.
struct PackPointers {
  const void* image[kMaxGroupLayers];
};
struct ExpandPointers {
  float* out[kMaxGroupLayers];
  float decay[kMaxGroupLayers], scale[kMaxGroupLayers];
};

// What a schedule does, for rooflines: multiply-adds of the tiles, padding included (kSplit: three each in hardware),
// and floats that are read from the inputs, packed, read by the tiles (mostly out of the second-level cache), written
// to slots, and in the outputs.
struct CovarianceCounts {
  double products = 0, inputs = 0, packed = 0, tile_reads = 0, slots = 0, outputs = 0;
};

// Wide tiles read 3 columns where squares read 4, but are a launch of their own, at whose end each multiprocessor, the
// 132 of an H100, waits for half a tile: from so many on, all as long as the longest, they read less than that takes.
constexpr int64_t kLeastWideTiles = 132 / 2 * 3;

// The schedule of some layers, made once per list of shapes; only pointers, decay and scale change between calls.
class CovarianceGroup {
 public:
  // Throws std::invalid_argument for more than kMaxGroupLayers layers, float64 or 2^31 and more rows.
  explicit CovarianceGroup(const std::vector<CovarianceProblem>& problems, int64_t least_wide_tiles = kLeastWideTiles);

  int layers() const { return layers_; }
  // Plain data that the kernels read: a copy on the device, 16-byte aligned, is what `schedule` wants.
  const std::vector<char>& descriptors() const { return descriptors_; }
  CovarianceSchedule schedule(const void* descriptors) const;
  int64_t workspace_bytes() const { return workspace_floats_ * int64_t(sizeof(float)); }
  const CovarianceCounts& counts() const { return counts_; }

 private:
  template <class Job>
  struct Span {
    int64_t jobs = 0, first = 0;
    int32_t count = 0, tiles = 0;
    JobList<Job> at(const char* base) const;
  };
  struct Builder;

  int layers_;
  int64_t workspace_floats_ = 0;
  CovarianceCounts counts_;
  std::vector<char> descriptors_;
  Span<PackJob> pack_, means_;
  Span<TileJob> wide_tiles_[kMmaModes], tiles_[kMmaModes];
  Span<LaneJob> lanes_;
  Span<ReduceJob> reduce_;
  Span<ExpandJob> expand_;
  int64_t regions_ = 0, terms_ = 0;
};

}  // namespace kfac
