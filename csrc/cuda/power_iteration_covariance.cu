#include "device_block.cuh"
#include "power_iteration_covariance.cuh"
#include "power_iteration_covariance.h"

namespace kfac {
namespace {

__global__ void __launch_bounds__(kPowerThreads, 2)
    covariance_power_iteration_kernel(const __grid_constant__ CovariancePowerJob job, const void* image, float* vector,
                                      const PowerMethod method, float* workspace, const PowerResults results) {
  DeviceBlock block;
  covariance_power_iteration(block, job, image, vector, method, workspace, results);
}

const void* function() {
  return reinterpret_cast<const void*>(covariance_power_iteration_kernel);
}

}  // namespace

cudaError_t covariance_power_blocks(int64_t n, int* blocks) {
  int device = 0, processors = 0, resident = 0, most = 0;
  *blocks = 0;
  cudaError_t status = reserve_shared(function(), &most);
  if (status != cudaSuccess || gram_shared_bytes(n) > most) return status;
  if ((status = cudaGetDevice(&device)) != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, covariance_power_iteration_kernel, kPowerThreads,
                                                         size_t(gram_shared_bytes(n)));
  *blocks = processors * resident;
  return status;
}

cudaError_t covariance_power_iteration_cuda(const CovariancePowerGroup& group, const void* image, float* vector,
                                            void* workspace, const PowerMethod& method, const PowerResults& results,
                                            cudaStream_t stream) {
  const CovariancePowerJob& job = group.job();
  const int64_t shared_bytes = gram_shared_bytes(job.team.n);
  int most = 0;
  cudaError_t status = reserve_shared(function(), &most);
  if (status != cudaSuccess) return status;
  status = cudaMemsetAsync(workspace, 0, size_t(kGramBarrierFloats) * sizeof(float), stream);
  if (status != cudaSuccess) return status;
  return launch_cooperative(covariance_power_iteration_kernel, job.team.blocks, kPowerThreads, int(shared_bytes),
                            stream, job, image, vector, method, static_cast<float*>(workspace), results);
}

std::vector<KernelInfo> covariance_power_kernels() {
  return {{"covariance_power_iteration_kernel", function(), kPowerThreads, 0}};
}

}  // namespace kfac
