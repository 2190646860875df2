// tiles: one tile of columns of one region's product P[rows]^T P[rows + shift], over one chunk of rows.
#pragma once

#include <type_traits>

#include "kfac/covariance_group.h"

namespace kfac {

// Starts the copies of one stage, kStageRows rows of columns A and of columns B, into shared memory [row][column].
// Rows beyond the chunk and columns beyond the group become zero.
template <class Shape, class Block>
KFAC_DEVICE void load_stage(Block& block, const TileJob& job, const TileWork& work, const typename Shape::Value* packed,
                            uint32_t stage, typename Shape::Value* a) {
  using Value = typename Shape::Value;
  constexpr int kVectors = Shape::kEdge / Shape::kVector, kRowsAtOnce = kBlockThreads / kVectors;
  Value* const b = a + Shape::kStageRows * Shape::kPitch;
  const int32_t column = block.thread() % kVectors * Shape::kVector;
  const bool valid_a = work.column_a + column < job.group_pitch;
  KFAC_UNROLL
  for (int pass = 0; pass < Shape::kStageRows / kRowsAtOnce; ++pass) {
    const int32_t line = pass * kRowsAtOnce + block.thread() / kVectors;
    const uint32_t k = work.first_row + stage * Shape::kStageRows + line;
    const bool valid = k < work.end_row;
    const int64_t row = valid ? int64_t(region_row(job.rows, k)) : 0;
    const Value* const from_a = packed + row * job.row_pitch + work.column_a + column;
    const Value* const from_b = packed + (row + job.rows.shift) * job.row_pitch + work.column_b + column;
    block.copy16(a + line * Shape::kPitch + column, valid && valid_a ? from_a : packed, valid && valid_a);
    KFAC_UNROLL
    for (int at = 0; at < Shape::kSquares * Shape::kEdge; at += Shape::kEdge) {
      const bool valid_b = valid && work.column_b + at + column < job.group_pitch;
      block.copy16(b + line * Shape::kPitchB + at + column, valid_b ? from_b + at : packed, valid_b);
    }
  }
}

// Cuts `value` into two tf32 numbers; their sum has 22 bits of mantissa. `high` is the nearest one, found by additions
// (Veltkamp 1968), which keep NaN and are twice as fast as operations on integers; beyond 2^114 it is NaN, and so would
// any square be. `low` is rounded by its bits: cut off, it would double the error of inverses of nearly singular
// matrices.
KFAC_DEVICE void split(float value, uint32_t& high, uint32_t& low) {
  constexpr uint32_t kUnit = 1u << 13;  // bits of a float beyond tf32
  const float scaled = rounded_product(value, float(kUnit + 1)), nearest = scaled + (value - scaled);
  high = float_bits(nearest);
  low = (float_bits(value - nearest) + kUnit / 2) & ~(kUnit - 1);
}

// sum += A B for one instruction's worth of 8 rows, in the way of the mode.
template <MmaMode kMode, class Block>
KFAC_DEVICE void multiply(Block& block, const uint32_t (&a)[2][4], const uint32_t (&b)[2][2], float (&sum)[4]) {
  if constexpr (kMode == MmaMode::kTf32) {
    block.mma(sum, a[0], b[0], sum);
  } else {
    const float zero[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    float part[4];
    if constexpr (kMode == MmaMode::kSplit) {
      block.mma(part, a[0], b[1], zero);
      block.mma(part, a[1], b[0], part);
      block.mma(part, a[0], b[0], part);
    } else {
      block.mma(part, a[0], b[0], zero);
    }
    KFAC_UNROLL
    for (int e = 0; e < 4; ++e) sum[e] += part[e];
  }
}

template <MmaMode kMode>
KFAC_DEVICE void fragment(float value, uint32_t& high, uint32_t& low) {
  if constexpr (kMode == MmaMode::kSplit) {
    split(value, high, low);
  } else {
    high = float_bits(value);
    low = 0;
  }
}

// Where the warp's part of the tile lies.
template <class Shape>
struct WarpPlace {
  int32_t row, column, depth;
};

template <class Shape>
KFAC_DEVICE WarpPlace<Shape> warp_place(int32_t warp) {
  return {warp % Shape::kWarpsM * (Shape::kMmaM * 16), warp / Shape::kWarpsM % Shape::kWarpsN * (Shape::kMmaN * 8),
          warp / (Shape::kWarpsM * Shape::kWarpsN)};
}

// sums += A^T B of one stage; a [row][column] and b likewise.
template <MmaMode kMode, class Shape, class Block>
KFAC_DEVICE void multiply_stage(Block& block, const float* a, float (&sums)[Shape::kMmaM][Shape::kMmaN][4]) {
  const WarpPlace<Shape> place = warp_place<Shape>(block.thread() / 32);
  const MmaLane lane = mma_lane(block.thread() % 32);
  const float* const b = a + Shape::kStageRows * Shape::kPitch;
  // kTf32 has registers left to load one step ahead; the others do not
  constexpr int kSteps = Shape::kStageRows / 8 / Shape::kWarpsK;
  KFAC_UNROLL_BY((kMode == MmaMode::kTf32 ? kSteps : 1))
  for (int step = 0; step < kSteps; ++step) {
    const int32_t k = (step * Shape::kWarpsK + place.depth) * 8;
    uint32_t left[Shape::kMmaM][2][4];
    KFAC_UNROLL
    for (int i = 0; i < Shape::kMmaM; ++i) {
      KFAC_UNROLL
      for (int e = 0; e < 4; ++e) {
        const float value = a[(k + mma_a_column(lane, e)) * Shape::kPitch + place.row + i * 16 + mma_a_row(lane, e)];
        fragment<kMode>(value, left[i][0][e], left[i][1][e]);
      }
    }
    KFAC_UNROLL
    for (int j = 0; j < Shape::kMmaN; ++j) {
      uint32_t right[2][2];
      KFAC_UNROLL
      for (int e = 0; e < 2; ++e) {
        const float value = b[(k + mma_b_row(lane, e)) * Shape::kPitchB + place.column + j * 8 + mma_b_column(lane)];
        fragment<kMode>(value, right[0][e], right[1][e]);
      }
      KFAC_UNROLL
      for (int i = 0; i < Shape::kMmaM; ++i) multiply<kMode>(block, left[i], right, sums[i][j]);
    }
  }
}

// The same of halves, which a warp takes from shared memory by matrices of 8 x 8.
template <MmaMode kMode, class Shape, class Block>
KFAC_DEVICE void multiply_halves(Block& block, const uint16_t* a, float (&sums)[Shape::kMmaM][Shape::kMmaN][4]) {
  static_assert(Shape::kMmaN % 2 == 0, "ldmatrix brings two B");
  const WarpPlace<Shape> place = warp_place<Shape>(block.thread() / 32);
  const HalfPlace own_a = half_a_place(block.thread() % 32), own_b = half_b_place(block.thread() % 32);
  constexpr int kStage = Shape::kStageRows * Shape::kPitch, kSteps = Shape::kStageRows / 16 / Shape::kWarpsK;
  const uint16_t* const from_a = a + own_a.row * Shape::kPitch + place.row + own_a.column;
  const uint16_t* const from_b = a + kStage + own_b.row * Shape::kPitchB + place.column + own_b.column;
  KFAC_UNROLL_BY(1)
  for (int step = 0; step < kSteps; ++step) {
    const int32_t k = (step * Shape::kWarpsK + place.depth) * 16;
    uint32_t left[Shape::kMmaM][4];
    KFAC_UNROLL
    for (int i = 0; i < Shape::kMmaM; ++i) block.load_turned(left[i], from_a + k * Shape::kPitch + i * 16);
    KFAC_UNROLL
    for (int pair = 0; pair < Shape::kMmaN / 2; ++pair) {
      uint32_t right[4];
      block.load_turned(right, from_b + k * Shape::kPitchB + pair * 16);
      KFAC_UNROLL
      for (int j = 0; j < 2; ++j) {
        const uint32_t b[2] = {right[2 * j], right[2 * j + 1]};
        KFAC_UNROLL
        for (int i = 0; i < Shape::kMmaM; ++i) {
          const float zero[4] = {0.0f, 0.0f, 0.0f, 0.0f};
          float part[4];
          block.template mma_halves<packed_dtype(kMode)>(part, left[i], b, zero);
          KFAC_UNROLL
          for (int e = 0; e < 4; ++e) sums[i][2 * pair + j][e] += part[e];
        }
      }
    }
  }
}

// Adds the sums of the warps that took other rows, in order, and writes the tile's squares to their slots [edge][edge].
template <class Shape, class Block>
KFAC_DEVICE void store_tile(Block& block, const float (&sums)[Shape::kMmaM][Shape::kMmaN][4], float* slot) {
  float* const shared = block.shared();  // [warp of rows][edge][pitch]
  const WarpPlace<Shape> place = warp_place<Shape>(block.thread() / 32);
  const MmaLane lane = mma_lane(block.thread() % 32);
  constexpr int kEdge = Shape::kEdge, kPitch = Shape::kPitch, kPlane = kEdge * kPitch;
  KFAC_UNROLL_BY(1)
  for (int square = 0; square < Shape::kSquares; ++square, slot += kEdge * kEdge) {
    if (square > 0) block.sync();  // the one before is read
    if (Shape::kSquares == 1 || place.column / kEdge == square) {
      KFAC_UNROLL
      for (int i = 0; i < Shape::kMmaM; ++i) {
        KFAC_UNROLL
        for (int j = 0; j < Shape::kMmaN; ++j) {
          KFAC_UNROLL
          for (int e = 0; e < 4; ++e) {
            const int32_t row = place.row + i * 16 + mma_d_row(lane, e),
                          column = place.column - square * kEdge + j * 8 + mma_d_column(lane, e);
            shared[place.depth * kPlane + row * kPitch + column] = sums[i][j][e];
          }
        }
      }
    }
    block.sync();
    for (int32_t at = block.thread(); at < kEdge * kEdge; at += kBlockThreads) {
      const float* const line = shared + at / kEdge * kPitch + at % kEdge;
      float sum = line[0];
      KFAC_UNROLL
      for (int depth = 1; depth < Shape::kWarpsK; ++depth) sum += line[depth * kPlane];
      slot[at] = sum;
    }
  }
}

template <MmaMode kMode, class Shape, class Block>
KFAC_DEVICE void sum_tile(Block& block, const TileJob& stored, int32_t tile, float* workspace) {
  const TileJob job = stored;  // a copy: what the stages ask of it stays in registers
  const TileWork work = tile_work(job, tile);
  using Value = typename Shape::Value;
  const Value* const packed =
      reinterpret_cast<const Value*>(workspace + job.packed) + int64_t(work.group) * job.group_pitch;
  const uint32_t stages = uint32_t(divide_up(work.end_row - work.first_row, Shape::kStageRows));
  const auto place_of = [&](uint32_t stage) {
    return reinterpret_cast<Value*>(block.shared() + stage % Shape::kStages * Shape::kStageFloats);
  };
  float sums[Shape::kMmaM][Shape::kMmaN][4] = {};
  block.sync();  // the tile before may still be read
  KFAC_UNROLL
  for (uint32_t stage = 0; stage < Shape::kStages - 1; ++stage) {
    if (stage < stages) load_stage<Shape>(block, job, work, packed, stage, place_of(stage));
    block.commit();
  }
  for (uint32_t stage = 0; stage < stages; ++stage) {
    block.template wait<Shape::kStages - 2>();
    block.sync();  // everyone's copies are here, and everyone is done with the stage before
    const uint32_t next = stage + Shape::kStages - 1;
    if (next < stages) load_stage<Shape>(block, job, work, packed, next, place_of(next));
    block.commit();
    if constexpr (packed_dtype(kMode) == DType::kFloat32) {
      multiply_stage<kMode, Shape>(block, place_of(stage), sums);
    } else {
      multiply_halves<kMode, Shape>(block, place_of(stage), sums);
    }
  }
  block.template wait<0>();
  block.sync();
  // the slot is read only now: no register held it, nor, beside the sums of a wide tile, where in it
  const TileWork place = Shape::kSquares == 1 ? work : tile_work(stored, tile);
  store_tile<Shape>(block, sums, workspace + tile_slot(stored, place));
}

// All tiles of a list, wide ones or squares.
template <MmaMode kMode, bool kWide, class Block>
KFAC_DEVICE void covariance_tiles(Block& block, const JobList<TileJob>& list, float* workspace) {
  using Value = std::conditional_t<packed_dtype(kMode) == DType::kFloat32, float, uint16_t>;
  int32_t number = 0;
  for (int32_t tile = block.index(); tile < list.tiles; tile += block.count()) {
    number = job_of_tile(list.first, number, tile);
    const TileJob& job = list.jobs[number];
    const int32_t own = tile - list.first[number];
    if constexpr (kWide) {
      sum_tile<kMode, WideTileShape<Value>>(block, job, own, workspace);
    } else if (job.edge == 128) {
      sum_tile<kMode, TileShape<128, Value>>(block, job, own, workspace);
    } else if (job.edge == 64) {
      sum_tile<kMode, TileShape<64, Value>>(block, job, own, workspace);
    } else {
      sum_tile<kMode, TileShape<32, Value>>(block, job, own, workspace);
    }
  }
}

}  // namespace kfac
