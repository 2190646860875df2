// The update of a level of tiles, A_ij <- A_ij - Y_i Y_j^T, and the pivot of the next; the other steps are in
// inverse_tiles.cuh.
#pragma once

#include "inverse_tiles.cuh"

namespace kfac {

// A_ij, from its place (rows, columns) on, and the panel whose columns from there on it loses the product of.
struct UpdateTile {
  float* Y;
  int32_t pitch, n, rows, columns;
  float* out;
};

// X of the job of a tile.
KFAC_DEVICE float* panel_before(const UpdateTile& tile) {
  return tile.Y - int64_t(kInverseEdge) * tile.pitch;
}

using TileSums = float[InverseShape128::kMmaM][InverseShape128::kMmaN][4];

// What a tile holds is taken in strips, of the rows of which every warp has 16: one mma instruction's.
constexpr int kUpdateStrips = InverseShape128::kMmaM, kStripLines = InverseShape128::kWarpsM * 16;
static_assert(kStripLines == 2 * InverseShape128::kStageRows && InverseShape128::kWarpsK == 1,
              "a strip has a stage's place");

// The row of the tile that a line of a strip is.
KFAC_DEVICE int32_t strip_row(int strip, int32_t line) {
  return line / 16 * (InverseShape128::kMmaM * 16) + strip * 16 + line % 16;
}

// body(place in the strip, entry of A, whether it is at or below the diagonal, its row and column in the tile) for the
// entries that a thread moves; 32 threads have neighbours.
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
      body(line * InverseShape128::kPitch + column, corner + int64_t(row) * tile.n + column, inside, row, column);
    }
  }
}

// stage <- a strip of A_ij
template <class Block>
KFAC_DEVICE void load_strip(Block& block, const UpdateTile& tile, int strip, float* stage) {
  for_strip(block, tile, strip, [&](int32_t place, const float* entry, bool inside, int32_t, int32_t) {
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

// a strip of A_ij <- stage; of the row of tiles of the next pivot, and turned of its column, also X_j or X_i.
template <class Block>
KFAC_DEVICE void store_strip(Block& block, const UpdateTile& tile, int strip, int32_t next, const float* stage) {
  float* const X = panel_before(tile);
  const bool in_row = tile.rows == next * kInverseEdge;
  for_strip(block, tile, strip, [&](int32_t place, float* entry, bool inside, int32_t row, int32_t column) {
    const float value = inside ? stage[place] : 0.0f;
    if (inside) *entry = value;
    if (in_row) X[int64_t(row) * tile.pitch + tile.columns + column] = value;
  });
  if (tile.columns != next * kInverseEdge) return;
  static_assert(kStripLines == 32, "a lane each");
  const int32_t line = block.thread() % 32, row = tile.rows + strip_row(strip, line);
  for (int32_t column = block.thread() / 32; column < kInverseEdge; column += kInverseThreads / 32) {
    X[int64_t(column) * tile.pitch + row] = row < tile.n ? stage[line * InverseShape128::kPitch + column] : 0.0f;
  }
}

// The pivot's tile of a level: updated and swept at once, while other blocks update the rest.
template <class Block>
KFAC_DEVICE void update_pivot(Block& block, const InverseJob& job, int32_t level, const InversePointers& pointers,
                              float* workspace) {
  const InversePanels panels = inverse_panels(job, workspace);
  const int32_t failed = panels.failed[(level - 1) % 2];
  if (failed != 0) {
    if (block.thread() == 0) panels.failed[level % 2] = failed;
    return;
  }
  float* const Y = panels.Y + level * kInverseEdge;
  multiply_tile(block, Y, panels.pitch, Y, panels.pitch);
  sweep_pivot(block, job, level, pointers.inverse[job.place], panels, block.shared());
}

// Tiles of one block in order. A sweep takes as long as some tiles: blocks that sweep leave as many rounds to the rest.
constexpr int kSweepRounds = 4;

struct TileOrder {
  int32_t at, rest, shared_from, index, count;

  template <class Block>
  KFAC_DEVICE TileOrder(const Block& block, int32_t sweeps) : index(block.index()), count(block.count()) {
    const int32_t busy = sweeps < count ? sweeps : 0;
    rest = count - busy;
    shared_from = busy ? kSweepRounds * rest : 0;
    at = index < busy ? shared_from + index : index - busy;
  }

  KFAC_DEVICE void advance() {
    const bool alone = at < shared_from;
    at += alone ? rest : count;
    if (alone && at >= shared_from) at = shared_from + index;
  }
};

// A_ij <- A_ij - Y_i Y_j^T. One ring of stages holds rows of the panels, then strips of A_ij, then the next tile's: the
// copies of one begin while the products of the one before are not done yet. First come the pivots of the next level,
// which the first `sweeps` matrices have.
template <class Block>
KFAC_DEVICE void inverse_update(Block& block, const JobList<InverseJob>& list, int32_t level, int32_t sweeps,
                                const InversePointers& pointers, float* workspace) {
  using Shape = InverseShape128;
  constexpr int kProducts = kInverseEdge / Shape::kStageRows, kAll = kProducts + kUpdateStrips;
  constexpr int kAhead = Shape::kStages - 1;
  static_assert(kAll % Shape::kStages == 0, "stages are numbered through, from tile to tile");
  for (int32_t at = block.index(); at < sweeps; at += block.count()) {
    update_pivot(block, list.jobs[at], level + 1, pointers, workspace);
    block.sync();  // its rows may still be read
  }
  int32_t number = 0;
  TileOrder order(block, sweeps);
  const auto find = [&](UpdateTile& found) {  // the next tile that falls to this block; whether there is one
    for (; order.at < list.tiles; order.advance()) {
      number = job_of_tile(list.first, number, order.at);
      const InverseJob job = list.jobs[number];
      const TilePair pair = tile_pair(order.at - list.first[number], job.tiles - 1, true);
      const int32_t i = pair.i + (pair.i >= level), j = pair.j + (pair.j >= level);
      const InversePanels panels = inverse_panels(job, workspace);
      if (j == level + 1 && i == j) continue;
      if (panels.failed[level % 2] != 0) continue;
      found = {panels.Y, panels.pitch, job.n, i * kInverseEdge, j * kInverseEdge, pointers.inverse[job.place]};
      order.advance();
      return true;
    }
    return false;
  };
  const auto place_of = [&](int stage) { return block.shared() + stage % Shape::kStages * Shape::kStageFloats; };
  const auto load_products = [&](const UpdateTile& of, int stage) {
    load_product_stage(block, of.Y + of.rows, of.pitch, of.Y + of.columns, of.pitch, stage, place_of(stage));
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
      store_strip(block, tile, strip, level + 1, place_of(stage));
    }
    tile = next;
  }
  block.template wait<0>();
}

}  // namespace kfac
