// Launcher of greedy selection on a GPU.
#pragma once

#include <cuda_runtime.h>

#include <vector>

#include "kfac/greedy_group.h"
#include "launch.h"

namespace kfac {

// A layer, its workspace in place, and the lists of its neurons.
struct GreedyLayer {
  GreedyJob job;
  std::vector<GreedyList> lists;
};

// One step in every layer, on the current device; a layer where no column goes has its neurons scored. *change and
// failures must hold 0 and -1 before. Two calls with the same inputs give the same bits.
cudaError_t greedy_remove_cuda(const std::vector<GreedyLayer>& layers, cudaStream_t stream);

std::vector<KernelInfo> greedy_kernels();

}  // namespace kfac
