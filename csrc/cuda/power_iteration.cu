#include "device_block.cuh"
#include "power_iteration.cuh"
#include "power_iteration.h"

namespace kfac {
namespace {

__global__ void __launch_bounds__(kPowerThreads, 1)
    power_iteration_kernel(const PowerSchedule schedule, const __grid_constant__ PowerPointers pointers,
                           const PowerMethod method, float* workspace, const PowerResults results) {
  DeviceBlock block;
  power_iteration(block, schedule, pointers, method, workspace, results);
}

const void* function() {
  return reinterpret_cast<const void*>(power_iteration_kernel);
}

}  // namespace

// One block a multiprocessor, with all the shared memory a block may have: what it keeps need not be read again.
cudaError_t power_iteration_device(PowerDevice* found) {
  int device = 0, processors = 0, resident = 0;
  cudaError_t status = reserve_shared(function(), &found->shared_bytes);
  if (status != cudaSuccess) return status;
  if ((status = cudaGetDevice(&device)) != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, power_iteration_kernel, kPowerThreads,
                                                         found->shared_bytes);
  found->blocks = processors * resident;
  return status;
}

cudaError_t power_iteration_cuda(const PowerGroup& group, const void* descriptors, void* workspace,
                                 const PowerPointers& pointers, const PowerMethod& method, const PowerResults& results,
                                 cudaStream_t stream) {
  const PowerSchedule schedule = group.schedule(descriptors);
  if (schedule.blocks == 0) return cudaSuccess;
  int shared_bytes = 0;
  cudaError_t status = reserve_shared(function(), &shared_bytes);
  if (status != cudaSuccess) return status;
  if (group.barrier_bytes() > 0) {
    status = cudaMemsetAsync(workspace, 0, size_t(group.barrier_bytes()), stream);
    if (status != cudaSuccess) return status;
  }
  return launch_cooperative(power_iteration_kernel, schedule.blocks, kPowerThreads,
                            schedule.shared_floats * int(sizeof(float)), stream, schedule, pointers, method,
                            static_cast<float*>(workspace), results);
}

std::vector<KernelInfo> power_iteration_kernels() {
  return {{"power_iteration_kernel", function(), kPowerThreads, 0}};
}

}  // namespace kfac
