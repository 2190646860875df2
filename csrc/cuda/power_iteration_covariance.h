// Launcher of the matrix-free power iteration on a GPU.
#pragma once

#include <cuda_runtime.h>

#include <vector>

#include "kfac/power_iteration_covariance_group.h"
#include "launch.h"

namespace kfac {

// How many blocks the current device holds at once for vectors of size n; 0 if these do not fit into shared memory.
cudaError_t covariance_power_blocks(int64_t n, int* blocks);

// The dominant eigenpair of the covariance of `image`, in one launch; no thread waits for the host and two calls with
// the same inputs give the same bits.
// group: made for covariance_power_blocks of the current device. vector: [n], the start, then the eigenvector.
// workspace: group.workspace_bytes(), 256-byte aligned; any content.
cudaError_t covariance_power_iteration_cuda(const CovariancePowerGroup& group, const void* image, float* vector,
                                            void* workspace, const PowerMethod& method, const PowerResults& results,
                                            cudaStream_t stream);

std::vector<KernelInfo> covariance_power_kernels();

}  // namespace kfac
