// The launchers of csrc/cuda/*.cu with simulated threads.
#pragma once

#include "../../csrc/cuda/covariance_expand.cuh"
#include "../../csrc/cuda/covariance_lanes.cuh"
#include "../../csrc/cuda/covariance_pack.cuh"
#include "../../csrc/cuda/covariance_tiles.cuh"
#include "../../csrc/cuda/greedy.cuh"
#include "../../csrc/cuda/inverse_sweep.cuh"
#include "../../csrc/cuda/inverse_tiles.cuh"
#include "../../csrc/cuda/inverse_update.cuh"
#include "../../csrc/cuda/power_iteration.cuh"
#include "../../csrc/cuda/power_iteration_covariance.cuh"
#include "../../csrc/cuda/saliency.cuh"
#include "simulated_block.h"

inline void emulate_covariance(const kfac::CovarianceGroup& group, const void* descriptors, float* workspace,
                               const kfac::PackPointers& images, const kfac::ExpandPointers& outs,
                               const simulated::Schedule& how) {
  using namespace kfac;
  using simulated::Block;
  const CovarianceSchedule s = group.schedule(descriptors);
  const auto launch = [&](int64_t shared, const std::function<void(Block&)>& body) {
    simulated::run(kBlockThreads, shared, how, body);
  };
  launch(kPackSharedBytes, [&](Block& b) { covariance_pack(b, s.pack, images, workspace); });
  launch(kLineSharedBytes, [&](Block& b) { covariance_means(b, s.means, images, workspace); });
  launch(kWideSharedBytes, [&](Block& b) { covariance_tiles<MmaMode::kTf32, true>(b, s.wide_tiles[0], workspace); });
  launch(kWideSharedBytes,
         [&](Block& b) { covariance_tiles<MmaMode::kBFloat16, true>(b, s.wide_tiles[1], workspace); });
  launch(kWideSharedBytes, [&](Block& b) { covariance_tiles<MmaMode::kFloat16, true>(b, s.wide_tiles[3], workspace); });
  launch(kTileSharedBytes, [&](Block& b) { covariance_tiles<MmaMode::kTf32, false>(b, s.tiles[0], workspace); });
  launch(kTileSharedBytes, [&](Block& b) { covariance_tiles<MmaMode::kBFloat16, false>(b, s.tiles[1], workspace); });
  launch(kTileSharedBytes, [&](Block& b) { covariance_tiles<MmaMode::kSplit, false>(b, s.tiles[2], workspace); });
  launch(kTileSharedBytes, [&](Block& b) { covariance_tiles<MmaMode::kFloat16, false>(b, s.tiles[3], workspace); });
  launch(kLineSharedBytes, [&](Block& b) { covariance_lanes(b, s.lanes, workspace); });
  launch(0, [&](Block& b) { covariance_reduce(b, s.reduce, workspace); });
  launch(kExpandSharedBytes, [&](Block& b) { covariance_expand(b, s, outs, workspace); });
}

inline void emulate_power_iteration(const kfac::PowerGroup& group, const void* descriptors, float* workspace,
                                    const kfac::PowerPointers& pointers, const kfac::PowerMethod& method,
                                    const kfac::PowerResults& results, simulated::Order order) {
  const kfac::PowerSchedule s = group.schedule(descriptors);
  if (s.blocks == 0) return;
  memset(workspace, 0, size_t(group.barrier_bytes()));
  const simulated::Schedule how{order, simulated::Copies::kLate, s.blocks, true};
  simulated::run(kfac::kPowerThreads, s.shared_floats * int64_t(sizeof(float)), how,
                 [&](simulated::Block& b) { kfac::power_iteration(b, s, pointers, method, workspace, results); });
}

inline void emulate_covariance_power(const kfac::CovariancePowerGroup& group, const void* image, float* vector,
                                     float* workspace, const kfac::PowerMethod& method,
                                     const kfac::PowerResults& results, simulated::Order order) {
  const kfac::CovariancePowerJob& job = group.job();
  memset(workspace, 0, size_t(kfac::kGramBarrierFloats) * sizeof(float));
  const simulated::Schedule how{order, simulated::Copies::kLate, job.team.blocks, true};
  simulated::run(kfac::kPowerThreads, kfac::gram_shared_bytes(job.team.n), how, [&](simulated::Block& b) {
    kfac::covariance_power_iteration(b, job, image, vector, method, workspace, results);
  });
}

inline void emulate_inverse(const kfac::InverseGroup& group, const void* descriptors, float* workspace,
                            const kfac::InversePointers& pointers, const kfac::InverseArguments& arguments,
                            const simulated::Schedule& how) {
  using namespace kfac;
  using simulated::Block;
  const auto launch = [&](int64_t shared, const std::function<void(Block&)>& body) {
    simulated::run(kInverseThreads, shared, how, body);
  };
  const InverseSchedule s = group.schedule(descriptors);
  launch(kSweepSharedBytes, [&](Block& b) { inverse_small(b, s, pointers, arguments); });
  const JobList<InverseJob> all = group.large(descriptors, InverseStep::kTriangle, 0);
  launch(0, [&](Block& b) { inverse_begin(b, all, pointers, arguments); });
  const JobList<InverseJob> pivot = group.large(descriptors, InverseStep::kPanel, 0);
  launch(kMirrorSharedBytes, [&](Block& b) { inverse_pivot(b, pivot, pointers, workspace); });
  for (int32_t level = 0; level < group.levels(); ++level) {
    const JobList<InverseJob> panel = group.large(descriptors, InverseStep::kPanel, level);
    const JobList<InverseJob> update = group.large(descriptors, InverseStep::kUpdate, level);
    const int32_t sweeps = group.active(level + 1);
    launch(kProductSharedBytes, [&](Block& b) { inverse_panel(b, panel, level, pointers, workspace); });
    launch(kProductSharedBytes, [&](Block& b) { inverse_update(b, update, level, sweeps, pointers, workspace); });
  }
  launch(kMirrorSharedBytes, [&](Block& b) { inverse_finish(b, all, pointers, arguments, workspace); });
}

inline void emulate_pi_damping(const kfac::PiPairs& pairs, double damping, double* amounts) {
  simulated::run(kfac::kInverseThreads, kfac::kPiSharedBytes, {},
                 [&](simulated::Block& b) { kfac::pi_damping(b, pairs, damping, amounts); });
}

inline void emulate_saliency(const kfac::SaliencyGroup& group, const void* descriptors,
                             const kfac::SaliencyPointers& pointers, kfac::Saliency kind, int32_t* flags,
                             const simulated::Schedule& how) {
  const kfac::JobList<kfac::SaliencyJob> list = group.schedule(descriptors);
  simulated::run(kfac::kSaliencyThreads, kfac::kSaliencySharedBytes, how, [&](simulated::Block& b) {
    if (kind == kfac::Saliency::kObs) {
      kfac::saliency<kfac::Saliency::kObs>(b, list, pointers, flags);
    } else {
      kfac::saliency<kfac::Saliency::kObd>(b, list, pointers, flags);
    }
  });
}

inline void emulate_greedy(const std::vector<kfac::GreedyJob>& jobs,
                           const std::vector<std::vector<kfac::GreedyList>>& lists, const simulated::Schedule& how) {
  using namespace kfac;
  using simulated::Block;
  const auto launch = [&](int64_t shared, const std::function<void(Block&)>& body) {
    simulated::run(kGreedyThreads, shared, how, body);
  };
  for (const GreedyJob& job : jobs) {
    if (!job.q) continue;
    launch(0, [&](Block& b) { greedy_gather(b, job); });
    const simulated::Schedule alone{how.order, how.copies, 1};
    simulated::run(kGreedyThreads, kGreedyPivotBytes, alone, [&](Block& b) { greedy_pivot(b, job); });
  }
  for (size_t i = 0; i < jobs.size(); ++i) {
    const GreedyJob& job = jobs[i];
    if (job.q) {
      launch(0, [&](Block& b) { greedy_weights(b, job); });
      launch(0, [&](Block& b) { greedy_products(b, job); });
      launch(0, [&](Block& b) { greedy_forms(b, job); });
      launch(kGreedyColumnBytes, [&](Block& b) { greedy_columns(b, job); });
    }
    for (const GreedyList& list : lists[i]) {
      launch(kGreedyScoreBytes, [&](Block& b) { greedy_scores(b, job, list); });
    }
    if (job.q) launch(0, [&](Block& b) { greedy_finish(b, job); });
  }
}
