// Launcher of the scores of neurons on a GPU.
#pragma once

#include <cuda_runtime.h>

#include <vector>

#include "kfac/saliency_group.h"
#include "launch.h"

namespace kfac {

// scores <- 1/2 tr(V_J^T G V_J A_JJ), or 1/2 tr(V_J^T G V_J (H_JJ)^-1) for kObs, of every neuron of the group, on the
// current device. flags (kObs): an int32 a neuron, layer after layer: 1 where H_JJ is not positive definite, else 0.
// descriptors: a copy of group.descriptors() on the device. Two calls with the same inputs give the same bits.
cudaError_t saliency_cuda(const SaliencyGroup& group, const void* descriptors, const SaliencyPointers& pointers,
                          Saliency kind, int32_t* flags, cudaStream_t stream);

std::vector<KernelInfo> saliency_kernels();

}  // namespace kfac
