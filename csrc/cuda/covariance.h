// Launchers of the covariance on a GPU.
#pragma once

#include <cuda_runtime.h>

#include <vector>

#include "kfac/covariance_group.h"
#include "launch.h"

namespace kfac {

// outs[l] <- decay[l] outs[l] + scale[l] (sum of a a^T) for every layer l of the group, on the current device.
// descriptors: a copy of group.descriptors() on the device. workspace: group.workspace_bytes(), 256-byte aligned; any
// content. Two calls with the same inputs give the same bits.
cudaError_t covariance_cuda(const CovarianceGroup& group, const void* descriptors, void* workspace,
                            const PackPointers& images, const ExpandPointers& outs, cudaStream_t stream);

std::vector<KernelInfo> covariance_kernels();

}  // namespace kfac
