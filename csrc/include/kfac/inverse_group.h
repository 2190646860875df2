// Damped inverses of many matrices: which block inverts which matrix, and the levels of those that many blocks share.
//
// Plain data and index maps only. csrc/cuda/inverse_*.cuh follow this schedule; tests/native runs the same code on the
// CPU.
//
// small   n <= kInverseEdge: a block holds the matrix in registers and sweeps it, one pivot after the other
// large   tiles of kInverseEdge, swept one block column after the other, all matrices at the same level at once:
//   begin    inverse <- M + D, the lower triangle
//   pivot    A_00 = L L^T: L^-1, A_00 <- -(A_00)^-1; X_i <- A_i0 for all other i
//   for each level K
//     panel    Y_i <- X_i L^-T, refined where pivots differ much; A_iK <- Y_i L^-1
//     update   A_ij <- A_ij - Y_i Y_j^T for all other i >= j; meanwhile the pivot of level K + 1, and its X_i
//   finish   inverse <- -A, both triangles, or NaN where a pivot failed
//
// The sweep of a pivot p (Goodnight 1979): a_ij <- a_ij - a_ik a_kj / p, a_ik <- a_ik / p, a_kk <- -1 / p. After all of
// them A is -(M + D)^-1, and the pivots were the squared diagonal of the Cholesky factor. By tiles, the update through
// Y loses as many digits as the square root of the pivot's condition has; through (A_KK)^-1 it would be the condition.
// One step of refinement, Y_i <- Y_i + (X_i - Y_i L^T) L^-T, wins these back where there are many.
#pragma once

#include <array>
#include <vector>

#include "kfac/device.h"

namespace kfac {

constexpr int kInverseThreads = 256;
constexpr int kInverseEdge = 128;
constexpr int kSweepSide = 16;  // threads along an edge: thread (y, x) holds rows y + 16 i and columns x + 16 j
constexpr int kSweepPer = kInverseEdge / kSweepSide;
constexpr int kSweepSharedBytes = 2 * kInverseEdge * int(sizeof(float));  // two rows
static_assert(kSweepSide * kSweepSide == kInverseThreads, "");

// What changes from call to call; as kernel parameters, of which there are 4 KB.
constexpr int kMaxInverseMatrices = 160;
struct InversePointers {
  const float* matrix[kMaxInverseMatrices];    // [n, n]; the lower triangle is read
  const float* diagonal[kMaxInverseMatrices];  // [n] or null: added to the diagonal,
  float* inverse[kMaxInverseMatrices];         // [n, n] contiguous
};
struct InverseArguments {
  const double* amounts;  // [matrices]: likewise
  int32_t* info;          // [matrices]: 0, or k if the leading minor of order k is not positive or not finite
};

struct InverseJob {
  int64_t stride;  // between rows of the matrix
  int32_t n, place;
  int32_t tiles;   // along an edge
  int64_t panels;  // offset in the workspace, in floats: X and Y, L^-1 twice, L, whether Y is refined, what failed
};

// Floats of the workspace of a large matrix, a multiple of 64.
KFAC_HD int64_t inverse_panel_floats(int32_t tiles) {
  return int64_t(kInverseEdge) * kInverseEdge * (3 + 2 * tiles) + 64;
}

struct InverseSchedule {
  const InverseJob* small;
  int32_t small_count;
};

// Which tiles of a large matrix a step works on: pairs i >= j of all, rows of tiles but the pivot's, and their pairs.
// Matrices are sorted by size, so those that have a level come first.
enum class InverseStep : int { kTriangle = 0, kPanel = 1, kUpdate = 2 };
constexpr int kInverseSteps = 3;

KFAC_HD int32_t inverse_step_tiles(InverseStep step, int32_t tiles) {
  if (step == InverseStep::kTriangle) return tiles * (tiles + 1) / 2;
  return step == InverseStep::kUpdate ? (tiles - 1) * tiles / 2 : tiles - 1;
}

constexpr int64_t kMaxInverseSize = int64_t(1) << 21;  // tiles of one matrix are numbered in 32 bits

struct InverseShape {
  int64_t n, stride;
};

// What a schedule does, for rooflines: multiply-adds of the matrix units (three each in hardware), launches, pivots one
// after the other.
struct InverseCounts {
  double products = 0;
  int64_t launches = 0, pivots = 0;
};

// The schedule for matrices of these shapes; only pointers change between calls.
class InverseGroup {
 public:
  // Throws std::invalid_argument for more than kMaxInverseMatrices, or sizes of kMaxInverseSize and more.
  explicit InverseGroup(const std::vector<InverseShape>& shapes);

  int64_t matrices() const { return matrices_; }
  // Plain data that the kernels read: a copy on the device, 16-byte aligned, is what `schedule` wants.
  const std::vector<char>& descriptors() const { return descriptors_; }
  InverseSchedule schedule(const void* descriptors) const;
  int32_t levels() const { return int32_t(active_.size()); }
  // How many large matrices have this level.
  int32_t active(int32_t level) const { return level < levels() ? active_[level] : 0; }
  // The tiles of a step at a level; kTriangle has level 0 only.
  JobList<InverseJob> large(const void* descriptors, InverseStep step, int32_t level) const;
  int64_t workspace_bytes() const { return workspace_floats_ * int64_t(sizeof(float)); }
  InverseCounts counts() const;

 private:
  int64_t matrices_, workspace_floats_ = 0;
  int32_t small_count_ = 0;
  std::vector<int32_t> active_;                // of each level
  std::vector<int32_t> first_[kInverseSteps];  // tiles of the matrices before
  int64_t first_offset_[kInverseSteps] = {}, large_offset_ = 0;
  std::vector<char> descriptors_;
};

// ---- pi-corrected damping ------------------------------------------------------------------------------------------

// Amounts sqrt(damping) pi of A and sqrt(damping) / pi of G, pi = sqrt(mean diag A / mean diag G).
constexpr int kMaxPiPairs = 64;
struct PiPairs {
  const float* matrix[kMaxPiPairs][2];  // A, G
  int64_t stride[kMaxPiPairs][2];
  int32_t n[kMaxPiPairs][2], place[kMaxPiPairs][2];  // place: in the list of amounts
  int32_t count;
};

// Pairs of (matrix, row stride, n, place) of A and the same of G.
PiPairs pi_pairs(const std::vector<std::array<int64_t, 8>>& pairs);

}  // namespace kfac
