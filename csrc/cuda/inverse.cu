#include "device_block.cuh"
#include "inverse.h"
#include "inverse_sweep.cuh"
#include "inverse_tiles.cuh"
#include "inverse_update.cuh"

namespace kfac {
namespace {

__global__ void __launch_bounds__(kInverseThreads, 2)
    inverse_small_kernel(const InverseSchedule schedule, const __grid_constant__ InversePointers pointers,
                         const InverseArguments arguments) {
  DeviceBlock block;
  inverse_small(block, schedule, pointers, arguments);
}

__global__ void __launch_bounds__(kInverseThreads)
    inverse_begin_kernel(const JobList<InverseJob> list, const __grid_constant__ InversePointers pointers,
                         const InverseArguments arguments) {
  DeviceBlock block;
  inverse_begin(block, list, pointers, arguments);
}

__global__ void __launch_bounds__(kInverseThreads, 1)
    inverse_pivot_kernel(const JobList<InverseJob> list, const __grid_constant__ InversePointers pointers,
                         float* workspace) {
  DeviceBlock block;
  inverse_pivot(block, list, pointers, workspace);
}

__global__ void __launch_bounds__(kInverseThreads, 1)
    inverse_panel_kernel(const JobList<InverseJob> list, int32_t level,
                         const __grid_constant__ InversePointers pointers, float* workspace) {
  DeviceBlock block;
  inverse_panel(block, list, level, pointers, workspace);
}

__global__ void __launch_bounds__(kInverseThreads, 1)
    inverse_update_kernel(const JobList<InverseJob> list, int32_t level, int32_t sweeps,
                          const __grid_constant__ InversePointers pointers, float* workspace) {
  DeviceBlock block;
  inverse_update(block, list, level, sweeps, pointers, workspace);
}

__global__ void __launch_bounds__(kInverseThreads)
    inverse_finish_kernel(const JobList<InverseJob> list, const __grid_constant__ InversePointers pointers,
                          const InverseArguments arguments, float* workspace) {
  DeviceBlock block;
  inverse_finish(block, list, pointers, arguments, workspace);
}

__global__ void __launch_bounds__(kInverseThreads)
    pi_damping_kernel(const __grid_constant__ PiPairs pairs, double damping, double* amounts) {
  DeviceBlock block;
  pi_damping(block, pairs, damping, amounts);
}

cudaError_t invert_small(const InverseGroup& group, const void* descriptors, const InversePointers& pointers,
                         const InverseArguments& arguments, cudaStream_t stream) {
  const InverseSchedule schedule = group.schedule(descriptors);
  return launch_persistent(inverse_small_kernel, schedule.small_count, kInverseThreads, kSweepSharedBytes, stream,
                           schedule, pointers, arguments);
}

// Launches only: a level waits for the one before by the order of the stream.
cudaError_t invert_large(const InverseGroup& group, const void* descriptors, float* workspace,
                         const InversePointers& pointers, const InverseArguments& arguments, cudaStream_t stream) {
  const auto launch = [&](auto* kernel, const JobList<InverseJob>& list, int shared_bytes, const auto&... rest) {
    return launch_persistent(kernel, list.tiles, kInverseThreads, shared_bytes, stream, list, rest...);
  };
  const JobList<InverseJob> all = group.large(descriptors, InverseStep::kTriangle, 0);
  cudaError_t status = launch(inverse_begin_kernel, all, 0, pointers, arguments);
  if (status != cudaSuccess) return status;
  const JobList<InverseJob> pivot = group.large(descriptors, InverseStep::kPanel, 0);
  status = launch(inverse_pivot_kernel, pivot, kMirrorSharedBytes, pointers, workspace);
  for (int32_t level = 0; status == cudaSuccess && level < group.levels(); ++level) {
    const JobList<InverseJob> panel = group.large(descriptors, InverseStep::kPanel, level);
    status = launch(inverse_panel_kernel, panel, kProductSharedBytes, level, pointers, workspace);
    if (status != cudaSuccess) return status;
    const JobList<InverseJob> update = group.large(descriptors, InverseStep::kUpdate, level);
    const int32_t sweeps = group.active(level + 1);
    status = launch(inverse_update_kernel, update, kProductSharedBytes, level, sweeps, pointers, workspace);
  }
  if (status != cudaSuccess) return status;
  return launch(inverse_finish_kernel, all, kMirrorSharedBytes, pointers, arguments, workspace);
}

}  // namespace

cudaError_t damped_inverse_cuda(const InverseGroup& group, const void* descriptors, void* workspace,
                                const InversePointers& pointers, const InverseArguments& arguments,
                                cudaStream_t stream) {
  const cudaError_t status = invert_small(group, descriptors, pointers, arguments, stream);
  if (status != cudaSuccess || group.levels() == 0) return status;
  return invert_large(group, descriptors, static_cast<float*>(workspace), pointers, arguments, stream);
}

cudaError_t pi_damping_cuda(const PiPairs& pairs, double damping, double* amounts, cudaStream_t stream) {
  return launch_persistent(pi_damping_kernel, pairs.count, kInverseThreads, kPiSharedBytes, stream, pairs, damping,
                           amounts);
}

std::vector<KernelInfo> inverse_kernels() {
  const auto info = [](const char* name, auto* kernel, int shared) {
    return KernelInfo{name, reinterpret_cast<const void*>(kernel), kInverseThreads, shared};
  };
  return {info("inverse_small_kernel", inverse_small_kernel, kSweepSharedBytes),
          info("inverse_begin_kernel", inverse_begin_kernel, 0),
          info("inverse_pivot_kernel", inverse_pivot_kernel, kMirrorSharedBytes),
          info("inverse_panel_kernel", inverse_panel_kernel, kProductSharedBytes),
          info("inverse_update_kernel", inverse_update_kernel, kProductSharedBytes),
          info("inverse_finish_kernel", inverse_finish_kernel, kMirrorSharedBytes),
          info("pi_damping_kernel", pi_damping_kernel, kPiSharedBytes)};
}

}  // namespace kfac
