#include "device_block.cuh"
#include "inverse.h"
#include "inverse_sweep.cuh"

namespace kfac {
namespace {

__global__ void __launch_bounds__(kInverseThreads, 2)
    inverse_small_kernel(const InverseSchedule schedule, const __grid_constant__ InversePointers pointers,
                         const InverseArguments arguments) {
  DeviceBlock block;
  inverse_small(block, schedule, pointers, arguments);
}

__global__ void __launch_bounds__(kInverseThreads)
    pi_damping_kernel(const __grid_constant__ PiPairs pairs, double damping, double* amounts) {
  DeviceBlock block;
  pi_damping(block, pairs, damping, amounts);
}

}  // namespace

cudaError_t damped_inverse_cuda(const InverseGroup& group, const void* descriptors, void*,
                                const InversePointers& pointers, const InverseArguments& arguments,
                                cudaStream_t stream) {
  const InverseSchedule schedule = group.schedule(descriptors);
  return launch_persistent(inverse_small_kernel, schedule.small_count, kInverseThreads, kSweepSharedBytes, stream,
                           schedule, pointers, arguments);
}

cudaError_t pi_damping_cuda(const PiPairs& pairs, double damping, double* amounts, cudaStream_t stream) {
  return launch_persistent(pi_damping_kernel, pairs.count, kInverseThreads, kPiSharedBytes, stream, pairs, damping,
                           amounts);
}

std::vector<KernelInfo> inverse_kernels() {
  return {
      {"inverse_small_kernel", reinterpret_cast<const void*>(inverse_small_kernel), kInverseThreads, kSweepSharedBytes},
      {"pi_damping_kernel", reinterpret_cast<const void*>(pi_damping_kernel), kInverseThreads, kPiSharedBytes}};
}

}  // namespace kfac
