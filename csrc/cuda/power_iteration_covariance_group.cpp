#include "kfac/power_iteration_covariance_group.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace kfac {

CovariancePowerGroup::CovariancePowerGroup(const CovarianceProblem& problem, int64_t blocks) {
  if (problem.shape.groups != 1 || problem.mode != CovarianceMode::kExpand) {
    throw std::invalid_argument("covariance_power_iteration: one group and mode 'expand' are what has kernels");
  }
  if (blocks < 1) throw std::invalid_argument("covariance_power_iteration: no block fits on the device");
  const auto take = [&](int64_t floats) {
    return std::exchange(workspace_floats_, workspace_floats_ + align_up(floats, kGramBarrierFloats));
  };
  job_.patches = patch_job(problem);
  job_.bias = problem.bias;
  job_.lanes_along_channels = job_.patches.lanes_along_columns && problem.shape.channels >= kGramLaneChannels;
  job_.summed = 0;
  EigenJob& team = job_.team;
  team.n = int32_t(problem.shape.patch_size() + problem.bias);
  team.blocks = int32_t(std::clamp<int64_t>(int64_t(gram_rows(job_)) * team.n / kGramWork, 1, blocks));
  team.arrived = kGramBarrierFloats / 2;
  team.images = take(team.n);
  team.moments = take(2 * 2 * int64_t(team.blocks) * kPowerMoments);
  job_.sums = take(int64_t(team.blocks) * team.n);
}

}  // namespace kfac
