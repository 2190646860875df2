// Inverses of matrices that a block's registers hold, and pi-corrected damping.
#pragma once

#include "block_sum.cuh"
#include "kfac/inverse_group.h"

namespace kfac {

// The part of a matrix that a thread holds.
template <int kPer>
struct SweepTile {
  float a[kPer][kPer];
};

KFAC_DEVICE int32_t sweep_row(int32_t thread, int i) {
  return thread / kSweepSide + i * kSweepSide;
}
KFAC_DEVICE int32_t sweep_column(int32_t thread, int j) {
  return thread % kSweepSide + j * kSweepSide;
}

// Where the inverse of the Cholesky factor goes, by rows and by columns, and the factor itself, by columns,
// [kInverseEdge][kInverseEdge] each; and whether products with the inverse have to be refined. Or nowhere.
struct FactorInverse {
  float *rows = nullptr, *columns = nullptr, *lower = nullptr, *refines = nullptr;
};

// By how much the largest pivot of a tile may exceed the smallest before products with L^-1 are refined: they lose as
// many digits as the square root of that.
constexpr float kMostSpread = 4096.0f;

// 1 / sqrt(p), to a unit in the last place; on a GPU in five instructions, as all warps wait for it.
KFAC_DEVICE float inverse_root(float p) {
#ifdef __CUDA_ARCH__
  const float root = rsqrtf(p);
  return root * (1.5f - 0.5f * (p * root) * root);
#else
  return 1.0f / sqrtf(p);
#endif
}

// Sweeps the first n pivots; 0, or 1 + the first that is not positive or not finite, at which it stops. Both factors of
// an update are scaled by 1 / sqrt(p), so that entries (i, j) and (j, i) keep the same bits. `rows`: shared memory for
// two rows of the matrix, one written while the other is read.
//
// Row k of the inverse of the Cholesky factor is (-a_kj / sqrt(p) for j < k, 1 / sqrt(p)) with the entries that pivot k
// finds: sweeping repeats forward substitution. Column k of the factor is (sqrt(p), a_kj / sqrt(p) for j > k).
template <int kPer, class Block>
KFAC_DEVICE int32_t sweep(Block& block, float* rows, int32_t n, SweepTile<kPer>& tile,
                          const FactorInverse& factor = {}) {
  const int32_t y = block.thread() / kSweepSide, x = block.thread() % kSweepSide;
  float largest = 0.0f, smallest = 0.0f;
  FactorInverse to;  // entries of this thread's column
  if (factor.rows) {
    to = {factor.rows + block.thread(), factor.columns + block.thread() * kInverseEdge, factor.lower + block.thread()};
  }
  KFAC_UNROLL
  for (int major = 0; major < kPer; ++major) {  // unrolled: registers have no run-time index
    for (int32_t minor = 0; minor < kSweepSide; ++minor) {
      const int32_t pivot = major * kSweepSide + minor;
      if (pivot >= n) break;
      float* const row = rows + pivot % 2 * (kPer * kSweepSide);
      if (y == minor) {
        KFAC_UNROLL
        for (int j = 0; j < kPer; ++j) row[x + j * kSweepSide] = tile.a[major][j];
      }
      block.sync();
      const float p = row[pivot];
      if (!(p > 0.0f && p - p == 0.0f)) return pivot + 1;  // the same for all threads
      largest = pivot && p < largest ? largest : p;
      smallest = pivot && p > smallest ? smallest : p;
      const float scale = inverse_root(p);
      float left[kPer], right[kPer];
      KFAC_UNROLL
      for (int i = 0; i < kPer; ++i) {
        left[i] = row[y + i * kSweepSide] * scale;
        right[i] = row[x + i * kSweepSide] * scale;
      }
      KFAC_UNROLL
      for (int i = 0; i < kPer; ++i) {
        KFAC_UNROLL
        for (int j = 0; j < kPer; ++j) tile.a[i][j] -= left[i] * right[j];
      }
      if (y == minor) {
        KFAC_UNROLL
        for (int j = 0; j < kPer; ++j) tile.a[major][j] = right[j] * scale;
      }
      if (x == minor) {
        KFAC_UNROLL
        for (int i = 0; i < kPer; ++i) tile.a[i][major] = left[i] * scale;
      }
      if (y == minor && x == minor) tile.a[major][major] = -scale * scale;
      if (factor.rows && block.thread() < kInverseEdge) {  // each a column, so that no warp is waited for
        const int32_t column = block.thread();
        const float value = row[column] * scale;
        *to.rows = *to.columns = column < pivot ? -value : column == pivot ? scale : 0.0f;
        *to.lower = column > pivot ? value : column == pivot ? p * scale : 0.0f;
        to = {to.rows + kInverseEdge, to.columns + 1, to.lower + kInverseEdge};
      }
    }
  }
  if (factor.refines && block.thread() == 0) *factor.refines = largest > kMostSpread * smallest;
  return 0;
}

// What is added to the diagonal of a matrix.
struct Damping {
  float amount;
  const float* diagonal;
};

KFAC_DEVICE Damping damping_of(const InverseJob& job, const InversePointers& pointers,
                               const InverseArguments& arguments) {
  return {float(arguments.amounts[job.place]), pointers.diagonal[job.place]};
}

KFAC_DEVICE float damping_at(const Damping& damping, int32_t row) {
  return damping.diagonal ? damping.amount + damping.diagonal[row] : damping.amount;
}

// The identity beyond the matrix.
template <int kPer, class Block>
KFAC_DEVICE void load_tile(Block& block, const InverseJob& job, const float* matrix, const Damping& damping,
                           SweepTile<kPer>& tile) {
  KFAC_UNROLL
  for (int i = 0; i < kPer; ++i) {
    KFAC_UNROLL
    for (int j = 0; j < kPer; ++j) {
      const int32_t row = sweep_row(block.thread(), i), column = sweep_column(block.thread(), j);
      const bool lower = i == j ? row >= column : i > j;
      float value = row == column ? 1.0f : 0.0f;
      if (row < job.n && column < job.n) {
        value = matrix[(lower ? row : column) * job.stride + (lower ? column : row)];
        if (row == column) value += damping_at(damping, row);
      }
      tile.a[i][j] = value;
    }
  }
}

template <int kPer, class Block>
KFAC_DEVICE void invert_small(Block& block, const InverseJob& job, const InversePointers& pointers,
                              const InverseArguments& arguments) {
  SweepTile<kPer> tile;
  load_tile(block, job, pointers.matrix[job.place], damping_of(job, pointers, arguments), tile);
  block.sync();  // the rows of the job before may still be read
  const int32_t info = sweep(block, block.shared(), job.n, tile);
  float* const inverse = pointers.inverse[job.place];
  KFAC_UNROLL
  for (int i = 0; i < kPer; ++i) {
    KFAC_UNROLL
    for (int j = 0; j < kPer; ++j) {
      const int32_t row = sweep_row(block.thread(), i), column = sweep_column(block.thread(), j);
      if (row < job.n && column < job.n) inverse[row * job.n + column] = info ? bits_float(0x7fc00000u) : -tile.a[i][j];
    }
  }
  if (block.thread() == 0) arguments.info[job.place] = info;
}

template <class Block>
KFAC_DEVICE void inverse_small(Block& block, const InverseSchedule& schedule, const InversePointers& pointers,
                               const InverseArguments& arguments) {
  for (int32_t at = block.index(); at < schedule.small_count; at += block.count()) {
    const InverseJob& job = schedule.small[at];
    if (job.n <= kSweepSide) {
      invert_small<1>(block, job, pointers, arguments);
    } else if (job.n <= 2 * kSweepSide) {
      invert_small<2>(block, job, pointers, arguments);
    } else if (job.n <= 4 * kSweepSide) {
      invert_small<4>(block, job, pointers, arguments);
    } else {
      invert_small<kSweepPer>(block, job, pointers, arguments);
    }
  }
}

constexpr int kPiSharedBytes = 2 * kInverseThreads / 32 * int(sizeof(double));

// A block a pair.
template <class Block>
KFAC_DEVICE void pi_damping(Block& block, const PiPairs& pairs, double damping, double* amounts) {
  for (int32_t pair = block.index(); pair < pairs.count; pair += block.count()) {
    double sum[2] = {0.0, 0.0};
    KFAC_UNROLL
    for (int which = 0; which < 2; ++which) {
      const int64_t step = pairs.stride[pair][which] + 1;
      for (int32_t i = block.thread(); i < pairs.n[pair][which]; i += kInverseThreads) {
        sum[which] += pairs.matrix[pair][which][i * step];
      }
    }
    block_sum<kInverseThreads>(block, reinterpret_cast<double*>(block.shared()), sum);
    if (block.thread() != 0) continue;
    const double pi = sqrt(sum[0] / pairs.n[pair][0] / (sum[1] / pairs.n[pair][1]));
    const double ratio = pi > 0.0 && pi - pi == 0.0 ? pi : 1.0;
    amounts[pairs.place[pair][0]] = sqrt(damping) * ratio;
    amounts[pairs.place[pair][1]] = sqrt(damping) / ratio;
  }
}

}  // namespace kfac
