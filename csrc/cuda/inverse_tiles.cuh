// The steps of inverting large matrices by tiles; what they compute: kfac/inverse_group.h
#pragma once

#include "covariance_tiles.cuh"
#include "inverse_sweep.cuh"

namespace kfac {

using InverseShape128 = TileShape<kInverseEdge>;
constexpr int kProductSharedBytes = 4 * InverseShape128::kSharedFloats;
constexpr int kMirrorEdge = 32, kMirrorPitch = kMirrorEdge + 1;
constexpr int kMirrorSharedBytes = 4 * kMirrorEdge * kMirrorPitch;
static_assert(kMirrorSharedBytes >= kSweepSharedBytes, "the pivot step uses either");
static_assert(kInverseThreads == kBlockThreads, "both kinds of tile are a block's");

// Where a job's panels lie: X [k][row] and Y [j][row], transposed so that rows of the matrix run along memory; L^-1 and
// L; and, as info says it, what failed at levels to this one, of even and odd levels: one is read while the pivot of
// the next level writes the other.
struct InversePanels {
  FactorInverse factor;
  float *X, *Y;
  int32_t pitch;  // of X and Y
  int32_t* failed;
};

KFAC_DEVICE InversePanels inverse_panels(const InverseJob& job, float* workspace) {
  constexpr int kSquare = kInverseEdge * kInverseEdge;
  float* const X = workspace + job.panels;
  float* const rows = X + int64_t(kSquare) * (2 * job.tiles);
  return {{rows, rows + kSquare, rows + 2 * kSquare, rows + 3 * kSquare},
          X,
          X + int64_t(kSquare) * job.tiles,
          job.tiles * kInverseEdge,
          reinterpret_cast<int32_t*>(rows + 3 * kSquare + 1)};
}

// body(job, tile of the job) for every tile of the list that falls to this block.
template <class Block, class Body>
KFAC_DEVICE void for_each_tile(Block& block, const JobList<InverseJob>& list, const Body& body) {
  int32_t number = 0;
  for (int32_t tile = block.index(); tile < list.tiles; tile += block.count()) {
    number = job_of_tile(list.first, number, tile);
    const InverseJob job = list.jobs[number];  // a copy: kept while entries are stored
    body(job, tile - list.first[number]);
  }
}

// ---- begin ---------------------------------------------------------------------------------------------------------

template <class Block>
KFAC_DEVICE void inverse_begin(Block& block, const JobList<InverseJob>& list, const InversePointers& pointers,
                               const InverseArguments& arguments) {
  for_each_tile(block, list, [&](const InverseJob& job, int32_t tile) {
    const TilePair at = tile_pair(tile, job.tiles, true);
    const float* const matrix = pointers.matrix[job.place];
    float* const out = pointers.inverse[job.place];
    const Damping damping = damping_of(job, pointers, arguments);
    const int32_t first = at.j * kInverseEdge + block.thread() % 32;
    for (int32_t line = block.thread() / 32; line < kInverseEdge; line += kInverseThreads / 32) {
      const int32_t row = at.i * kInverseEdge + line;
      if (row >= job.n) break;
      float values[kInverseEdge / 32] = {};
      KFAC_UNROLL
      for (int k = 0; k < kInverseEdge / 32; ++k) {
        const int32_t column = first + 32 * k;
        if (column <= row) values[k] = matrix[row * job.stride + column];
      }
      KFAC_UNROLL
      for (int k = 0; k < kInverseEdge / 32; ++k) {
        const int32_t column = first + 32 * k;
        if (column > row) continue;
        out[int64_t(row) * job.n + column] = row == column ? values[k] + damping_at(damping, row) : values[k];
      }
    }
  });
}

// ---- pivot ---------------------------------------------------------------------------------------------------------

// L^-1 of A_KK = L L^T, with rows of zeros beyond the matrix; A_KK <- -(A_KK)^-1. A_KK first loses `product`, in shared
// memory with pitch InverseShape128::kPitch, if there is one.
template <class Block>
KFAC_DEVICE void sweep_pivot(Block& block, const InverseJob& job, int32_t level, float* out,
                             const InversePanels& panels, const float* product) {
  const FactorInverse& factor = panels.factor;
  const int32_t first = level * kInverseEdge, size = smaller(kInverseEdge, job.n - first);
  float* const corner = out + int64_t(first) * (job.n + 1);
  const InverseJob own{job.n, size, 0, 0, 0};
  SweepTile<kSweepPer> tile;
  load_tile(block, own, corner, Damping{0.0f, nullptr}, tile);
  if (product) {
    KFAC_UNROLL
    for (int i = 0; i < kSweepPer; ++i) {
      KFAC_UNROLL
      for (int j = 0; j < kSweepPer; ++j) {
        const int32_t row = sweep_row(block.thread(), i), column = sweep_column(block.thread(), j);
        const bool lower = i == j ? row >= column : i > j;
        const int32_t place = (lower ? row : column) * InverseShape128::kPitch + (lower ? column : row);
        if (row < size && column < size) tile.a[i][j] -= product[place];
      }
    }
  }
  for (int32_t at = block.thread(); at < (kInverseEdge - size) * kInverseEdge; at += kInverseThreads) {
    const int32_t row = size + at / kInverseEdge, column = at % kInverseEdge;
    factor.rows[row * kInverseEdge + column] = factor.columns[column * kInverseEdge + row] = 0.0f;
    factor.lower[row * kInverseEdge + column] = 0.0f;
  }
  block.sync();  // the product, or the rows, may still be read
  const int32_t failed = sweep(block, block.shared(), size, tile, factor);
  KFAC_UNROLL
  for (int i = 0; i < kSweepPer; ++i) {
    KFAC_UNROLL
    for (int j = 0; j < kSweepPer; ++j) {
      const int32_t row = sweep_row(block.thread(), i), column = sweep_column(block.thread(), j);
      if (row < size && column <= row) corner[int64_t(row) * job.n + column] = tile.a[i][j];
    }
  }
  if (block.thread() == 0) panels.failed[level % 2] = failed ? first + failed : 0;
}

// X[k][rows of the tile] <- A_i0, zero beyond the matrix
template <class Block>
KFAC_DEVICE void gather_panel(Block& block, const InverseJob& job, int32_t tile, const float* out,
                              const InversePanels& panels) {
  const int32_t lane = block.thread() % 32, warp = block.thread() / 32, base = tile * kInverseEdge;
  float* const square = block.shared();  // [kMirrorEdge][kMirrorPitch]
  for (int32_t part = 0; part < kInverseEdge * kInverseEdge; part += kMirrorEdge * kMirrorEdge) {
    const int32_t i0 = part / kInverseEdge / kMirrorEdge * kMirrorEdge, k0 = part / kMirrorEdge % kInverseEdge;
    block.sync();
    for (int32_t i = warp; i < kMirrorEdge; i += kInverseThreads / 32) {
      const int32_t row = base + i0 + i;
      square[i * kMirrorPitch + lane] = row < job.n ? out[int64_t(row) * job.n + k0 + lane] : 0.0f;
    }
    block.sync();
    for (int32_t k = warp; k < kMirrorEdge; k += kInverseThreads / 32) {
      panels.X[int64_t(k0 + k) * panels.pitch + base + i0 + lane] = square[lane * kMirrorPitch + k];
    }
  }
}

// The first pivot of all; the others fall to the update of the level before.
template <class Block>
KFAC_DEVICE void inverse_pivot(Block& block, const JobList<InverseJob>& list, const InversePointers& pointers,
                               float* workspace) {
  for (int32_t at = block.index(); at < list.count; at += block.count()) {
    const InverseJob& job = list.jobs[at];
    sweep_pivot(block, job, 0, pointers.inverse[job.place], inverse_panels(job, workspace), nullptr);
  }
  for_each_tile(block, list, [&](const InverseJob& job, int32_t number) {
    gather_panel(block, job, number + 1, pointers.inverse[job.place], inverse_panels(job, workspace));
  });
}

// ---- panel --------------------------------------------------------------------------------------------------------

// Rows of `left` and `right` [kInverseEdge][...], kInverseEdge columns of each, into a stage of shared memory.
template <class Block>
KFAC_DEVICE void load_product_stage(Block& block, const float* left, int32_t left_pitch, const float* right,
                                    int32_t right_pitch, int32_t stage, float* to) {
  constexpr int kVectors = kInverseEdge / 4, kRowsAtOnce = kBlockThreads / kVectors;
  constexpr int kPitch = InverseShape128::kPitch, kRows = InverseShape128::kStageRows;
  const int32_t column = block.thread() % kVectors * 4;
  KFAC_UNROLL
  for (int pass = 0; pass < kRows / kRowsAtOnce; ++pass) {
    const int32_t line = pass * kRowsAtOnce + block.thread() / kVectors, row = stage * kRows + line;
    block.copy16(to + line * kPitch + column, left + int64_t(row) * left_pitch + column, true);
    block.copy16(to + (kRows + line) * kPitch + column, right + int64_t(row) * right_pitch + column, true);
  }
}

// left^T right, [kInverseEdge][kInverseEdge] each, as exact as a float32 product; in shared memory with pitch
// InverseShape128::kPitch on return.
template <class Block>
KFAC_DEVICE void multiply_tile(Block& block, const float* left, int32_t left_pitch, const float* right,
                               int32_t right_pitch) {
  using Shape = InverseShape128;
  constexpr int kAll = kInverseEdge / Shape::kStageRows;
  float* const shared = block.shared();
  float sums[Shape::kMmaM][Shape::kMmaN][4] = {};
  block.sync();  // the tile before may still be read
  KFAC_UNROLL
  for (int stage = 0; stage < Shape::kStages - 1; ++stage) {
    load_product_stage(block, left, left_pitch, right, right_pitch, stage, shared + stage * Shape::kStageFloats);
    block.commit();
  }
  for (int stage = 0; stage < kAll; ++stage) {
    block.template wait<Shape::kStages - 2>();
    block.sync();  // everyone's copies are here, and everyone is done with the stage before
    const int next = stage + Shape::kStages - 1;
    if (next < kAll) {
      load_product_stage(block, left, left_pitch, right, right_pitch, next,
                         shared + next % Shape::kStages * Shape::kStageFloats);
    }
    block.commit();
    multiply_stage<MmaMode::kSplit, Shape>(block, shared + stage % Shape::kStages * Shape::kStageFloats, sums);
  }
  block.template wait<0>();
  block.sync();
  const WarpPlace<Shape> place = warp_place<Shape>(block.thread() / 32);
  const MmaLane lane = mma_lane(block.thread() % 32);
  KFAC_UNROLL
  for (int i = 0; i < Shape::kMmaM; ++i) {
    KFAC_UNROLL
    for (int j = 0; j < Shape::kMmaN; ++j) {
      KFAC_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int32_t row = place.row + i * 16 + mma_d_row(lane, e);
        shared[row * Shape::kPitch + place.column + j * 8 + mma_d_column(lane, e)] = sums[i][j][e];
      }
    }
  }
  block.sync();
}

// panel <- keep panel + add product: a tile of X or Y [k][row] and the one in shared memory.
template <class Block>
KFAC_DEVICE void blend_panel(Block& block, float* panel, int32_t pitch, float keep, float add) {
  constexpr int kLines = kInverseThreads / kInverseEdge;
  constexpr int kAtOnce = 16;  // entries that a thread waits for together
  const int32_t line = block.thread() / kInverseEdge, own = block.thread() % kInverseEdge;
  const float* const product = block.shared() + own;
  KFAC_UNROLL_BY(1)
  for (int32_t first = line; first < kInverseEdge; first += kLines * kAtOnce) {
    float old[kAtOnce] = {};
    KFAC_UNROLL
    for (int k = 0; k < kAtOnce; ++k) {
      if (keep != 0.0f) old[k] = panel[int64_t(first + k * kLines) * pitch + own];
    }
    KFAC_UNROLL
    for (int k = 0; k < kAtOnce; ++k) {
      const int32_t i = first + k * kLines;
      panel[int64_t(i) * pitch + own] = old[k] + add * product[i * InverseShape128::kPitch];
    }
  }
}

// Y_i <- X_i L^-T, A_iK <- Y_i L^-1. A tile number leaves out the pivot's. Where the pivot is ill-conditioned Y_i is
// refined once: X_i <- X_i - Y_i L^T, Y_i <- Y_i + X_i L^-T. A_iK below the pivot is X_K of the next level.
template <class Block>
KFAC_DEVICE void inverse_panel(Block& block, const JobList<InverseJob>& list, int32_t level,
                               const InversePointers& pointers, float* workspace) {
  for_each_tile(block, list, [&](const InverseJob& job, int32_t number) {
    const InversePanels panels = inverse_panels(job, workspace);
    if (panels.failed[level % 2] != 0) return;
    const int32_t tile = number + (number >= level), base = tile * kInverseEdge, first = level * kInverseEdge;
    float* const out = pointers.inverse[job.place];
    const float* const result = block.shared();  // [k][row]
    multiply_tile(block, panels.factor.columns, kInverseEdge, panels.X + base, panels.pitch);
    blend_panel(block, panels.Y + base, panels.pitch, 0.0f, 1.0f);
    if (*panels.factor.refines != 0.0f) {
      multiply_tile(block, panels.factor.lower, kInverseEdge, panels.Y + base, panels.pitch);
      blend_panel(block, panels.X + base, panels.pitch, 1.0f, -1.0f);
      multiply_tile(block, panels.factor.columns, kInverseEdge, panels.X + base, panels.pitch);
      blend_panel(block, panels.Y + base, panels.pitch, 1.0f, 1.0f);
    }
    multiply_tile(block, panels.factor.rows, kInverseEdge, panels.Y + base, panels.pitch);
    for (int32_t at = block.thread(); at < kInverseEdge * kInverseEdge; at += kInverseThreads) {
      const int32_t high = at / kInverseEdge, low = at % kInverseEdge;
      if (tile < level) {  // as (A_Ki)^T
        if (first + high >= job.n) continue;
        out[int64_t(first + high) * job.n + base + low] = result[high * InverseShape128::kPitch + low];
      } else {
        const bool inside = base + high < job.n;
        const float value = inside ? result[low * InverseShape128::kPitch + high] : 0.0f;
        if (inside) out[int64_t(base + high) * job.n + first + low] = value;
        if (tile == level + 1) panels.X[int64_t(high) * panels.pitch + first + low] = value;
      }
    }
  });
}

// ---- finish --------------------------------------------------------------------------------------------------------

// A square of kMirrorEdge at or below the diagonal: out <- -A there and at its mirror image.
template <class Block>
KFAC_DEVICE void mirror_square(Block& block, int32_t n, int32_t row0, int32_t column0, bool failed, float* out) {
  float* const square = block.shared();
  const int32_t lane = block.thread() % 32;
  block.sync();
  constexpr int kLines = kInverseThreads / 32, kAtOnce = kMirrorEdge / kLines;
  const int32_t warp = block.thread() / 32, own_column = column0 + lane;
  float values[kAtOnce] = {};
  KFAC_UNROLL
  for (int k = 0; k < kAtOnce; ++k) {
    const int32_t row = row0 + warp + k * kLines;
    if (row < n && own_column <= row) values[k] = out[int64_t(row) * n + own_column];
  }
  KFAC_UNROLL
  for (int k = 0; k < kAtOnce; ++k) {
    const int32_t line = warp + k * kLines, row = row0 + line;
    if (row >= n || own_column > row) continue;
    const float value = failed ? bits_float(0x7fc00000u) : -values[k];
    out[int64_t(row) * n + own_column] = square[line * kMirrorPitch + lane] = value;
  }
  block.sync();
  for (int32_t line = block.thread() / 32; line < kMirrorEdge; line += kInverseThreads / 32) {
    const int32_t row = row0 + lane, column = column0 + line;
    if (row >= n || column >= row) continue;
    out[int64_t(column) * n + row] = square[lane * kMirrorPitch + line];
  }
}

template <class Block>
KFAC_DEVICE void inverse_finish(Block& block, const JobList<InverseJob>& list, const InversePointers& pointers,
                                const InverseArguments& arguments, float* workspace) {
  for_each_tile(block, list, [&](const InverseJob& job, int32_t tile) {
    const TilePair at = tile_pair(tile, job.tiles, true);
    const int32_t failed = inverse_panels(job, workspace).failed[(job.tiles - 1) % 2];
    if (tile == 0 && block.thread() == 0) arguments.info[job.place] = failed;
    constexpr int kSquares = kInverseEdge / kMirrorEdge;
    for (int32_t square = 0; square < kSquares * kSquares; ++square) {
      const int32_t row = at.i * kInverseEdge + square / kSquares * kMirrorEdge;
      const int32_t column = at.j * kInverseEdge + square % kSquares * kMirrorEdge;
      if (row < job.n && column <= row)
        mirror_square(block, job.n, row, column, failed != 0, pointers.inverse[job.place]);
    }
  });
}

}  // namespace kfac
