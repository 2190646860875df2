// Tiles of products that a block multiplies on the matrix units: their shapes, and who holds what of an instruction.
#pragma once

#include "kfac/device.h"

namespace kfac {

constexpr int kBlockThreads = 256;

// The part of a [C, C] product that a block computes, and how 8 warps share it: kWarpsK warps take other rows. Packed
// values are floats or halves (uint16_t); a stage, of kFloatRows rows of floats, has twice as many of halves. A tile is
// kSquares squares side by side, each with kEdge columns A and as many columns B.
template <class PackedValue, int kEdgeColumns, int kSquaresAcross, int kWarpsRows, int kWarpsColumns, int kFloatRows,
          int kDepth>
struct TileShapeBase {
  using Value = PackedValue;
  static constexpr int kVector = 16 / sizeof(Value);   // values that one asynchronous copy takes
  static constexpr int kMmaRows = 32 / sizeof(Value);  // rows that one mma instruction multiplies
  static constexpr int kEdge = kEdgeColumns, kSquares = kSquaresAcross;
  static constexpr int kWarpsM = kWarpsRows, kWarpsN = kWarpsColumns;
  static constexpr int kWarpsK = kBlockThreads / 32 / (kWarpsM * kWarpsN);
  static constexpr int kStageRows = kFloatRows * 4 / sizeof(Value), kStages = kDepth;
  static constexpr int kMmaM = kEdge / kWarpsM / 16;  // mma instructions of a warp
  static constexpr int kMmaN = kSquares * kEdge / kWarpsN / 8;
  // rows of shared memory begin 8 banks apart: 4 rows of 8 channels, a fragment, touch each bank once; so do 8 rows of
  // 8 halves
  static constexpr int kPitch = kEdge + 8, kPitchB = kSquares * kEdge + 8;
  static constexpr int kStageFloats = kFloatRows * (kPitch + kPitchB);
  static constexpr int kSharedFloats = kStages * kStageFloats;
  static_assert(kWarpsK * kEdge * kPitch <= kSharedFloats, "the warps' sums are exchanged in the stages' memory");
  static_assert(kEdge % (8 * kMmaN) == 0, "a warp has columns of one square");
  static_assert(kStageRows % (kMmaRows * kWarpsK) == 0 && kStageRows * kEdge % (kVector * kBlockThreads) == 0, "");
};

template <int kEdge, class Value = float>
struct TileShape;
template <class Value>
struct TileShape<128, Value> : TileShapeBase<Value, 128, 1, 2, 4, 16, 4> {};
template <class Value>
struct TileShape<64, Value> : TileShapeBase<Value, 64, 1, 2, 2, 32, 4> {};
template <class Value>
struct TileShape<32, Value> : TileShapeBase<Value, 32, 1, 1, 1, 64, 3> {};

// Two squares of 128 columns: a quarter less is read than of both, 64 x 64 sums a warp. Three stages fit where a block
// may have 99 KB.
template <class Value>
struct WideTileShape : TileShapeBase<Value, 128, 2, 2, 4, 16, 3> {};

constexpr int kTileSharedBytes = 4 * TileShape<64>::kSharedFloats;
static_assert(TileShape<128>::kSharedFloats <= TileShape<64>::kSharedFloats, "");
static_assert(TileShape<32>::kSharedFloats <= TileShape<64>::kSharedFloats, "");
constexpr int kWideSharedBytes = 4 * WideTileShape<float>::kSharedFloats;

// Which element of a matrix each lane of a warp holds in registers of mma.sync.m16n8k8 on tf32 (A [16, 8], B [8, 8], D
// [16, 8]), as the PTX manual says. D of m16n8k16 is the same.
struct MmaLane {
  int32_t group, quad;
};

KFAC_HD MmaLane mma_lane(int32_t lane) {
  return {lane / 4, lane % 4};
}
KFAC_HD int32_t mma_a_row(MmaLane lane, int32_t element) {
  return lane.group + element % 2 * 8;
}
KFAC_HD int32_t mma_a_column(MmaLane lane, int32_t element) {
  return lane.quad + element / 2 * 4;
}
KFAC_HD int32_t mma_b_row(MmaLane lane, int32_t element) {
  return lane.quad + element * 4;
}
KFAC_HD int32_t mma_b_column(MmaLane lane) {
  return lane.group;
}
KFAC_HD int32_t mma_d_row(MmaLane lane, int32_t element) {
  return lane.group + element / 2 * 8;
}
KFAC_HD int32_t mma_d_column(MmaLane lane, int32_t element) {
  return lane.quad * 2 + element % 2;
}

// Where in a stage [row][column] the 8 halves begin that a lane names to ldmatrix, turned, for A [16, 16] or two B [16,
// 8] side by side of mma.sync.m16n8k16 on halves: what it then holds are the registers of the instruction, in order.
struct HalfPlace {
  int32_t row, column;
};

KFAC_HD HalfPlace half_a_place(int32_t lane) {
  return {lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8};
}
KFAC_HD HalfPlace half_b_place(int32_t lane) {
  return {lane / 8 % 2 * 8 + lane % 8, lane / 16 * 8};
}

}  // namespace kfac
