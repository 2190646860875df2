// Power iteration of a covariance that is never formed: which block takes which rows, and where blocks exchange sums.
//
// Plain data and index maps only. csrc/cuda/power_iteration_covariance.cuh follows this schedule; tests/native runs the
// same code on the CPU.
//
// A v = 1/R sum over the R rows a (patches) of (a.v) a. Each block takes a share of the rows, kGramRows at a time: a.v
// of each, then what they add to A v, read from the caches now. The blocks meet twice an iteration: once their sums are
// there, each adds up its share of the entries of A v over all blocks; once that is there, all go on with it.
#pragma once

#include "kfac/covariance_group.h"
#include "kfac/power_iteration_group.h"

namespace kfac {

constexpr int kGramRows = kPowerThreads;
constexpr int64_t kGramWork = 1 << 15;      // products of a block, at least: below, meeting costs more
constexpr int32_t kGramLaneChannels = 16;   // channels from which on lanes run along them, if these lie side by side
constexpr int32_t kGramWarpRows = 96;       // rows from which on a warp adds up an entry
constexpr int64_t kGramBarrierFloats = 32;  // the first of the workspace, zero when the kernel starts

struct CovariancePowerJob {
  PackJob patches;  // where the entries of a row lie
  EigenJob team;    // n, blocks, moments and the barrier after A v; `images`: A v [n]
  int64_t sums;     // offset in the workspace, in floats: [blocks][n], what each block's rows add
  int64_t summed;   // likewise: a uint32, how often a block has come to the barrier after the sums
  int32_t bias;     // a row ends with 1
  int32_t lanes_along_channels;
};

KFAC_HD int32_t gram_rows(const CovariancePowerJob& job) {
  return packed_rows(job.patches);
}

// The rows of the block of this rank.
KFAC_HD RowRange gram_share(const CovariancePowerJob& job, int32_t rank) {
  const int64_t rows = gram_rows(job);
  const int32_t first = int32_t(rows * rank / job.team.blocks);
  return {first, int32_t(rows * (rank + 1) / job.team.blocks) - first};
}

// Shared memory: sums of the block, v [n], its sums [n], a.v [kGramRows], sample, y and x of kGramRows rows.
KFAC_HD constexpr int64_t gram_shared_bytes(int64_t n) {
  return (kPowerSumFloats + 2 * n + 4 * int64_t(kGramRows)) * int64_t(sizeof(float));
}

// The schedule for inputs of one shape; only pointers change between calls.
class CovariancePowerGroup {
 public:
  // blocks: how many the device holds at once with gram_shared_bytes(n) each.
  // Throws std::invalid_argument for groups, kReduce, float64, 2^31 and more rows, or if no block fits.
  CovariancePowerGroup(const CovarianceProblem& problem, int64_t blocks);

  const CovariancePowerJob& job() const { return job_; }
  int64_t workspace_bytes() const { return workspace_floats_ * int64_t(sizeof(float)); }

 private:
  CovariancePowerJob job_{};
  int64_t workspace_floats_ = kGramBarrierFloats;
};

}  // namespace kfac
