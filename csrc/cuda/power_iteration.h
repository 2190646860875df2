// Launcher of the power iteration on a GPU.
#pragma once

#include <cuda_runtime.h>

#include <vector>

#include "kfac/power_iteration_group.h"
#include "launch.h"

namespace kfac {

// What the current device offers to one launch: blocks that are resident at once, and the shared memory of each.
struct PowerDevice {
  int blocks, shared_bytes;
};
cudaError_t power_iteration_device(PowerDevice* found);

// Dominant eigenpairs of the group's matrices, made for the current device, in one launch; no thread waits for the
// host and two calls with the same inputs give the same bits.
// descriptors: a copy of group.descriptors() on the device. workspace: group.workspace_bytes(), 256-byte aligned; any
// content.
cudaError_t power_iteration_cuda(const PowerGroup& group, const void* descriptors, void* workspace,
                                 const PowerPointers& pointers, const PowerMethod& method, const PowerResults& results,
                                 cudaStream_t stream);

std::vector<KernelInfo> power_iteration_kernels();

}  // namespace kfac
