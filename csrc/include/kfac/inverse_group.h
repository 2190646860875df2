// Damped inverses of many matrices: which block inverts which matrix, and the levels of those that many blocks share.
//
// Plain data and index maps only. csrc/cuda/inverse_*.cuh follow this schedule; tests/native runs the same code on the
// CPU.
//
// small   n <= kInverseEdge: a block holds the matrix in registers and sweeps it, one pivot after the other
// large   tiles of kInverseEdge, swept one block column after the other, all matrices at the same level at once:
//   begin    inverse <- M + D, the lower triangle
//   for each level K
//     pivot    P <- (A_KK)^-1, A_KK <- -P; X_i <- A_iK for all other i
//     panel    C_i <- X_i P, A_iK <- C_i
//     update   A_ij <- A_ij - C_i X_j^T for all other i >= j
//   finish   inverse <- -A, both triangles, or NaN where a pivot failed
//
// The sweep of a pivot p (Goodnight 1979): a_ij <- a_ij - a_ik a_kj / p, a_ik <- a_ik / p, a_kk <- -1 / p. After all of
// them A is -(M + D)^-1, and the pivots were the squared diagonal of the Cholesky factor.
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
};

struct InverseSchedule {
  const InverseJob* small;  // the largest first
  int32_t small_count;
};

struct InverseShape {
  int64_t n, stride;
};

// The schedule for matrices of these shapes; only pointers change between calls.
class InverseGroup {
 public:
  // Throws std::invalid_argument for more than kMaxInverseMatrices.
  explicit InverseGroup(const std::vector<InverseShape>& shapes);

  int64_t matrices() const { return matrices_; }
  // Plain data that the kernels read: a copy on the device, 16-byte aligned, is what `schedule` wants.
  const std::vector<char>& descriptors() const { return descriptors_; }
  InverseSchedule schedule(const void* descriptors) const;
  int64_t workspace_bytes() const { return 0; }

 private:
  int64_t matrices_;
  int32_t small_count_ = 0;
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
