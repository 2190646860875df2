// Launchers of the damped inverses on a GPU.
#pragma once

#include <cuda_runtime.h>

#include <vector>

#include "kfac/inverse_group.h"
#include "launch.h"

namespace kfac {

// inverse <- (M + (amount + diagonal) I)^-1, exactly symmetric, of every matrix of the group, on the current device;
// NaN where info is not 0. Nothing waits for the host, and two calls with the same inputs give the same bits.
// descriptors: a copy of group.descriptors() on the device. workspace: group.workspace_bytes(), 256-byte aligned; any
// content.
cudaError_t damped_inverse_cuda(const InverseGroup& group, const void* descriptors, void* workspace,
                                const InversePointers& pointers, const InverseArguments& arguments,
                                cudaStream_t stream);

// Writes the amounts of all pairs, on the current device.
cudaError_t pi_damping_cuda(const PiPairs& pairs, double damping, double* amounts, cudaStream_t stream);

std::vector<KernelInfo> inverse_kernels();

}  // namespace kfac
