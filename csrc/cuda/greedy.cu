#include "device_block.cuh"
#include "greedy.cuh"
#include "greedy.h"

namespace kfac {
namespace {

__global__ void __launch_bounds__(kGreedyThreads) greedy_gather_kernel(const GreedyJob job) {
  DeviceBlock block;
  greedy_gather(block, job);
}

__global__ void __launch_bounds__(kGreedyThreads) greedy_pivot_kernel(const GreedyJob job) {
  DeviceBlock block;
  greedy_pivot(block, job);
}

__global__ void __launch_bounds__(kGreedyThreads) greedy_weights_kernel(const GreedyJob job) {
  DeviceBlock block;
  greedy_weights(block, job);
}

__global__ void __launch_bounds__(kGreedyThreads) greedy_products_kernel(const GreedyJob job) {
  DeviceBlock block;
  greedy_products(block, job);
}

__global__ void __launch_bounds__(kGreedyThreads) greedy_forms_kernel(const GreedyJob job) {
  DeviceBlock block;
  greedy_forms(block, job);
}

__global__ void __launch_bounds__(kGreedyThreads) greedy_columns_kernel(const GreedyJob job) {
  DeviceBlock block;
  greedy_columns(block, job);
}

__global__ void __launch_bounds__(kGreedyThreads) greedy_scores_kernel(const GreedyJob job, const GreedyList list) {
  DeviceBlock block;
  greedy_scores(block, job, list);
}

__global__ void __launch_bounds__(kGreedyThreads) greedy_finish_kernel(const GreedyJob job) {
  DeviceBlock block;
  greedy_finish(block, job);
}

cudaError_t prepare(const GreedyJob& job, cudaStream_t stream) {
  const int64_t entries = int64_t(job.removed_count + job.outputs) * job.q;
  const cudaError_t status = launch_persistent(greedy_gather_kernel, int32_t(divide_up(entries, kGreedyThreads)),
                                               kGreedyThreads, 0, stream, job);
  if (status != cudaSuccess) return status;
  return launch_persistent(greedy_pivot_kernel, 1, kGreedyThreads, kGreedyPivotBytes, stream, job);
}

cudaError_t remove(const GreedyJob& job, cudaStream_t stream) {
  const auto launch = [&](void (*kernel)(const GreedyJob), int64_t work, int64_t each, int shared) {
    return launch_persistent(kernel, int32_t(divide_up(work, each)), kGreedyThreads, shared, stream, job);
  };
  const int64_t entries = int64_t(job.pending_count + job.q) * job.q;
  cudaError_t status = launch(greedy_weights_kernel, job.outputs, kGreedyThreads, 0);
  if (status == cudaSuccess) status = launch(greedy_products_kernel, job.outputs, kGreedyWarps, 0);
  if (status == cudaSuccess) status = launch(greedy_forms_kernel, entries, kGreedyWarps, 0);
  if (status == cudaSuccess) status = launch(greedy_columns_kernel, job.columns, kGreedyColumns, kGreedyColumnBytes);
  return status;
}

cudaError_t score(const GreedyLayer& layer, cudaStream_t stream) {
  for (const GreedyList& list : layer.lists) {
    const int64_t tiles = divide_up(list.count, greedy_neurons(list.block));
    const cudaError_t status = launch_persistent(greedy_scores_kernel, int32_t(tiles), kGreedyThreads,
                                                 kGreedyScoreBytes, stream, layer.job, list);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

cudaError_t finish(const GreedyJob& job, cudaStream_t stream) {
  const bool waits = job.pending_count + job.q <= job.pending_capacity;
  const int64_t entries = waits ? int64_t(job.q) * job.outputs : divide_up(job.outputs, 4) * job.columns;
  return launch_persistent(greedy_finish_kernel, int32_t(divide_up(entries, kGreedyThreads)), kGreedyThreads, 0, stream,
                           job);
}

}  // namespace

cudaError_t greedy_remove_cuda(const std::vector<GreedyLayer>& layers, cudaStream_t stream) {
  cudaError_t status = cudaSuccess;
  for (const GreedyLayer& layer : layers) {
    if (status == cudaSuccess && layer.job.q) status = prepare(layer.job, stream);
  }
  for (const GreedyLayer& layer : layers) {
    if (status == cudaSuccess && layer.job.q) status = remove(layer.job, stream);
    if (status == cudaSuccess) status = score(layer, stream);
    if (status == cudaSuccess && layer.job.q) status = finish(layer.job, stream);
  }
  return status;
}

std::vector<KernelInfo> greedy_kernels() {
  const auto info = [](const char* name, auto* kernel, int shared) {
    return KernelInfo{name, reinterpret_cast<const void*>(kernel), kGreedyThreads, shared};
  };
  return {info("greedy_gather_kernel", greedy_gather_kernel, 0),
          info("greedy_pivot_kernel", greedy_pivot_kernel, kGreedyPivotBytes),
          info("greedy_weights_kernel", greedy_weights_kernel, 0),
          info("greedy_products_kernel", greedy_products_kernel, 0),
          info("greedy_forms_kernel", greedy_forms_kernel, 0),
          info("greedy_columns_kernel", greedy_columns_kernel, kGreedyColumnBytes),
          info("greedy_scores_kernel", greedy_scores_kernel, kGreedyScoreBytes),
          info("greedy_finish_kernel", greedy_finish_kernel, 0)};
}

}  // namespace kfac
