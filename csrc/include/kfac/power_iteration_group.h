// Power iteration of many matrices in one launch: which blocks work on which matrix, and where they exchange vectors.
//
// Plain data and index maps only. csrc/cuda/power_iteration.cuh follows this schedule; tests/native runs the same code
// on the CPU.
//
// A matrix that fits into a block's shared memory is one block's, any other that of a team of blocks by its size. Each
// block keeps as many of its rows as fit in shared memory and reads the rest, through L2, at every iteration. The
// blocks of a team meet once an iteration, at a barrier of their own.
//
// No team can wait for ever. All blocks of a launch are resident at once (a cooperative launch, of no more blocks than
// the device holds), a block belongs to one team at most, and that team's matrix is the first in its list: so every
// block of a team reaches each of the team's barriers without waiting for anyone outside of it. The blocks of a team
// decide when to stop from the same numbers added in the same order, so they leave after the same iteration.
#pragma once

#include <cmath>
#include <vector>

#include "kfac/device.h"

namespace kfac {

constexpr int kPowerThreads = 512, kPowerWarps = kPowerThreads / 32;
constexpr int kPowerRows = 4;     // rows a warp multiplies at once: an entry of v is loaded once for all of them
constexpr int kTeamRows = 32;     // rows of a block in a team, at least: below, meeting costs more than multiplying
constexpr int kPowerMoments = 3;  // v.v, v.Av, Av.Av
constexpr int kPowerSumDoubles = kPowerWarps * kPowerMoments;
constexpr int kPowerSumFloats = 2 * kPowerSumDoubles;

// One matrix and its team: blocks first_block to first_block + blocks - 1.
struct EigenJob {
  int64_t stride;  // between rows of the matrix
  int32_t n, first_block, blocks;
  int32_t place;    // in the lists of pointers and results
  int64_t images;   // offset in the workspace, in floats: [2][n], A v of even and of odd iterations
  int64_t moments;  // likewise: doubles [2][blocks][kPowerMoments]
  int64_t arrived;  // likewise: a uint32, how often a block of the team has come to a barrier
};

// What changes from call to call; as kernel parameters, of which there are 4 KB.
constexpr int kMaxPowerMatrices = 224;
struct PowerPointers {
  const float* matrix[kMaxPowerMatrices];  // [n, n] symmetric
  float* vector[kMaxPowerMatrices];        // [n]: the start, then the eigenvector
};

struct PowerSchedule {
  const EigenJob* jobs;
  const int32_t* first;  // [blocks + 1]: the jobs of block b are list[first[b]] to list[first[b + 1] - 1]
  const int32_t* list;
  int32_t blocks, shared_floats;
};

struct PowerMethod {
  double tol;
  int32_t max_iter;
};

struct PowerResults {
  float *values, *residuals;  // [matrices]
  int32_t* iterations;
};

// The rows of a job that the block of this rank multiplies.
struct RowRange {
  int32_t first, count;
};

KFAC_HD RowRange team_rows(const EigenJob& job, int32_t rank) {
  const int32_t first = int32_t(int64_t(job.n) * rank / job.blocks);
  return {first, int32_t(int64_t(job.n) * (rank + 1) / job.blocks) - first};
}

// Shared memory of a block: sums, v [n], A v [n] where the block is alone, then rows of the matrix.
KFAC_HD constexpr int64_t power_rows_offset(int64_t n, bool alone) {
  return kPowerSumFloats + (alone ? 2 : 1) * n;
}

KFAC_HD int32_t kept_rows(const EigenJob& job, RowRange rows, int32_t shared_floats) {
  const int64_t room = shared_floats - power_rows_offset(job.n, job.blocks == 1);
  return smaller(rows.count, int32_t(room / job.n));
}

// `value` / |A v| in two factors, so that neither overflows or vanishes: a power of two and a number near one.
struct UnitScale {
  float power, rest;
};

KFAC_HD UnitScale unit_scale(double norm) {
  int exponent = 0;
  frexp(norm, &exponent);
  exponent = exponent < -125 ? -125 : exponent > 126 ? 126 : exponent;
  const double power = ldexp(1.0, -exponent);
  return {float(power), float(1.0 / (norm * power))};
}

KFAC_HD bool is_finite(double value) {
  return value - value == 0.0;
}

struct MatrixShape {
  int64_t n, stride;
};

// Whether a block with this much shared memory can hold the vectors of a matrix of size n.
KFAC_HD bool power_fits(int64_t n, int64_t shared_bytes) {
  return power_rows_offset(n, true) * int64_t(sizeof(float)) <= shared_bytes;
}

// What one iteration of a schedule does, for rooflines: entries of all matrices, those that are read from shared
// memory, and the most that one block multiplies.
struct PowerCounts {
  double entries = 0, kept = 0, most = 0;
};

// Distributes matrices over blocks, once per list of shapes; only pointers change between calls.
class PowerGroup {
 public:
  // blocks: how many the device holds at once with `shared_bytes` each.
  // Throws std::invalid_argument for more than kMaxPowerMatrices, or one that does not fit (power_fits).
  PowerGroup(const std::vector<MatrixShape>& shapes, int64_t blocks, int64_t shared_bytes);

  int64_t matrices() const { return matrices_; }
  const PowerCounts& counts() const { return counts_; }

  // Plain data that the kernel reads: a copy on the device, 16-byte aligned, is what `schedule` wants.
  const std::vector<char>& descriptors() const { return descriptors_; }
  PowerSchedule schedule(const void* descriptors) const;
  int64_t workspace_bytes() const { return workspace_floats_ * int64_t(sizeof(float)); }
  // The first bytes of the workspace, zero when the kernel starts: the barriers.
  int64_t barrier_bytes() const { return barrier_floats_ * int64_t(sizeof(float)); }

 private:
  void count(const std::vector<EigenJob>& jobs, const std::vector<std::vector<int32_t>>& lists);

  int64_t matrices_;
  int32_t blocks_, shared_floats_;
  int64_t workspace_floats_ = 0, barrier_floats_ = 0, first_offset_ = 0, list_offset_ = 0;
  PowerCounts counts_;
  std::vector<char> descriptors_;
};

}  // namespace kfac
