// The update of a level of tiles: A_ij <- A_ij - Y_i Y_j^T; the other steps are in inverse_tiles.cuh.
#pragma once

#include "inverse_tiles.cuh"

namespace kfac {

// A_ij, from its place (rows, columns) on, and the panels whose product it loses.
struct UpdateTile {
  const float *left, *right;
  int32_t pitch, n, rows, columns;
  float* out;
};

using TileSums = float[InverseShape128::kMmaM][InverseShape128::kMmaN][4];

// What a tile holds is taken in strips, of the rows of which every warp has 16: one mma instruction's.
constexpr int kUpdateStrips = InverseShape128::kMmaM, kStripLines = InverseShape128::kWarpsM * 16;
static_assert(kStripLines == 2 * InverseShape128::kStageRows && InverseShape128::kWarpsK == 1,
              "a strip has a stage's place");

// The row of the tile that a line of a strip is.
KFAC_DEVICE int32_t strip_row(int strip, int32_t line) {
  return line / 16 * (InverseShape128::kMmaM * 16) + strip * 16 + line % 16;
}

// body(place in the strip, entry of A, whether it is at or below the diagonal) for the entries that a thread moves; 32
// threads have neighbours.
template <class Block, class Body>
KFAC_DEVICE void for_strip(Block& block, const UpdateTile& tile, int strip, const Body& body) {
  const int32_t lane = block.thread() % 32, warp = block.thread() / 32;
  float* const corner = tile.out + int64_t(tile.rows) * tile.n + tile.columns;
  KFAC_UNROLL
  for (int pass = 0; pass < kStripLines / (kInverseThreads / 32); ++pass) {
    const int32_t line = pass * (kInverseThreads / 32) + warp, row = strip_row(strip, line);
    KFAC_UNROLL
    for (int k = 0; k < kInverseEdge / 32; ++k) {
      const int32_t column = lane + 32 * k;
      const bool inside = tile.rows + row < tile.n && tile.columns + column <= tile.rows + row;
      body(line * InverseShape128::kPitch + column, corner + int64_t(row) * tile.n + column, inside);
    }
  }
}

// stage <- a strip of A_ij
template <class Block>
KFAC_DEVICE void load_strip(Block& block, const UpdateTile& tile, int strip, float* stage) {
  for_strip(block, tile, strip, [&](int32_t place, const float* entry, bool inside) {
    block.copy4(stage + place, inside ? entry : tile.out, inside);
  });
}

// stage <- stage - the sums of a strip
template <class Block>
KFAC_DEVICE void subtract_sums(Block& block, const float (&sums)[InverseShape128::kMmaN][4], float* stage) {
  using Shape = InverseShape128;
  const WarpPlace<Shape> place = warp_place<Shape>(block.thread() / 32);
  const MmaLane lane = mma_lane(block.thread() % 32);
  const int32_t line = place.row / (Shape::kMmaM * 16) * 16;
  KFAC_UNROLL
  for (int j = 0; j < Shape::kMmaN; ++j) {
    KFAC_UNROLL
    for (int e = 0; e < 4; ++e) {
      stage[(line + mma_d_row(lane, e)) * Shape::kPitch + place.column + j * 8 + mma_d_column(lane, e)] -= sums[j][e];
    }
  }
}

// a strip of A_ij <- stage
template <class Block>
KFAC_DEVICE void store_strip(Block& block, const UpdateTile& tile, int strip, const float* stage) {
  for_strip(block, tile, strip, [&](int32_t place, float* entry, bool inside) {
    if (inside) *entry = stage[place];
  });
}

// A_ij <- A_ij - Y_i Y_j^T. One ring of stages holds rows of the panels, then strips of A_ij, then the next tile's: the
// copies of one begin while the products of the one before are not done yet.
template <class Block>
KFAC_DEVICE void inverse_update(Block& block, const JobList<InverseJob>& list, int32_t level,
                                const InversePointers& pointers, const InverseArguments& arguments, float* workspace) {
  using Shape = InverseShape128;
  constexpr int kProducts = kInverseEdge / Shape::kStageRows, kAll = kProducts + kUpdateStrips;
  constexpr int kAhead = Shape::kStages - 1;
  static_assert(kAll % Shape::kStages == 0, "stages are numbered through, from tile to tile");
  int32_t number = 0, at = block.index();
  const auto find = [&](UpdateTile& found) {  // the next tile that falls to this block; whether there is one
    for (; at < list.tiles; at += block.count()) {
      number = job_of_tile(list.first, number, at);
      const InverseJob job = list.jobs[number];
      if (arguments.info[job.place] != 0) continue;
      const TilePair pair = tile_pair(at - list.first[number], job.tiles - 1, true);
      const int32_t rows = (pair.i + (pair.i >= level)) * kInverseEdge;
      const int32_t columns = (pair.j + (pair.j >= level)) * kInverseEdge;
      const InversePanels panels = inverse_panels(job, workspace);
      found = {panels.Y + rows, panels.Y + columns, panels.pitch, job.n, rows, columns, pointers.inverse[job.place]};
      at += block.count();
      return true;
    }
    return false;
  };
  const auto place_of = [&](int stage) { return block.shared() + stage % Shape::kStages * Shape::kStageFloats; };
  const auto load_products = [&](const UpdateTile& of, int stage) {
    load_product_stage(block, of.left, of.pitch, of.right, of.pitch, stage, place_of(stage));
  };
  UpdateTile tile, next;
  bool more = find(tile);
  for (int stage = 0; more && stage < kAhead; ++stage) {
    load_products(tile, stage);
    block.commit();
  }
  while (more) {
    next = tile;
    more = find(next);
    TileSums sums = {};
    KFAC_UNROLL_BY(1)
    for (int stage = 0; stage < kProducts; ++stage) {
      block.template wait<Shape::kStages - 2>();
      block.sync();  // everyone's copies are here, and everyone is done with the stage before
      const int coming = stage + kAhead;
      if (coming < kProducts) {
        load_products(tile, coming);
      } else {
        load_strip(block, tile, coming - kProducts, place_of(coming));
      }
      block.commit();
      multiply_stage<MmaMode::kSplit, Shape>(block, place_of(stage), sums);
    }
    KFAC_UNROLL
    for (int strip = 0; strip < kUpdateStrips; ++strip) {
      const int stage = kProducts + strip, coming = stage + kAhead;
      block.template wait<Shape::kStages - 2>();
      block.sync();
      if (coming < kAll) {
        load_strip(block, tile, coming - kProducts, place_of(coming));
      } else if (more) {
        load_products(next, coming - kAll);
      }
      block.commit();
      subtract_sums(block, sums[strip], place_of(stage));
      block.sync();
      store_strip(block, tile, strip, place_of(stage));
    }
    tile = next;
  }
  block.template wait<0>();
}

}  // namespace kfac
