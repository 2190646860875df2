#include "covariance.h"
#include "covariance_expand.cuh"
#include "covariance_lanes.cuh"
#include "covariance_pack.cuh"
#include "covariance_tiles.cuh"
#include "device_block.cuh"

namespace kfac {
namespace {

__global__ void __launch_bounds__(kBlockThreads)
    covariance_pack_kernel(const JobList<PackJob> list, const __grid_constant__ PackPointers images, float* workspace) {
  DeviceBlock block;
  covariance_pack(block, list, images, workspace);
}

__global__ void __launch_bounds__(kBlockThreads)
    covariance_means_kernel(const JobList<PackJob> list, const __grid_constant__ PackPointers images,
                            float* workspace) {
  DeviceBlock block;
  covariance_means(block, list, images, workspace);
}

// One block a multiprocessor for the split mode, whose halves of operands need the registers.
template <MmaMode kMode>
__global__ void __launch_bounds__(kBlockThreads, kMode == MmaMode::kSplit ? 1 : 2)
    covariance_tiles_kernel(const JobList<TileJob> list, float* workspace) {
  DeviceBlock block;
  covariance_tiles<kMode, false>(block, list, workspace);
}

// Half of a multiprocessor's registers are sums of a wide tile.
template <MmaMode kMode>
__global__ void __launch_bounds__(kBlockThreads, 1)
    covariance_wide_tiles_kernel(const JobList<TileJob> list, float* workspace) {
  DeviceBlock block;
  covariance_tiles<kMode, true>(block, list, workspace);
}

__global__ void __launch_bounds__(kBlockThreads)
    covariance_lanes_kernel(const JobList<LaneJob> list, float* workspace) {
  DeviceBlock block;
  covariance_lanes(block, list, workspace);
}

__global__ void __launch_bounds__(kBlockThreads)
    covariance_reduce_kernel(const JobList<ReduceJob> list, float* workspace) {
  DeviceBlock block;
  covariance_reduce(block, list, workspace);
}

__global__ void __launch_bounds__(kBlockThreads)
    covariance_expand_kernel(const __grid_constant__ CovarianceSchedule schedule,
                             const __grid_constant__ ExpandPointers outs, const float* workspace) {
  DeviceBlock block;
  covariance_expand(block, schedule, outs, workspace);
}

template <MmaMode kMode>
cudaError_t launch_tiles(const CovarianceSchedule& schedule, float* workspace, cudaStream_t stream) {
  if constexpr (kMode != MmaMode::kSplit) {
    const JobList<TileJob>& wide = schedule.wide_tiles[static_cast<int>(kMode)];
    const cudaError_t status = launch_persistent(covariance_wide_tiles_kernel<kMode>, wide.tiles, kBlockThreads,
                                                 kWideSharedBytes, stream, wide, workspace);
    if (status != cudaSuccess) return status;
  }
  const JobList<TileJob>& list = schedule.tiles[static_cast<int>(kMode)];
  return launch_persistent(covariance_tiles_kernel<kMode>, list.tiles, kBlockThreads, kTileSharedBytes, stream, list,
                           workspace);
}

}  // namespace

cudaError_t covariance_cuda(const CovarianceGroup& group, const void* descriptors, void* workspace,
                            const PackPointers& images, const ExpandPointers& outs, cudaStream_t stream) {
  const CovarianceSchedule s = group.schedule(descriptors);
  float* const floats = static_cast<float*>(workspace);
  const float* const results = floats;
  cudaError_t status = launch_persistent(covariance_pack_kernel, s.pack.tiles, kBlockThreads, kPackSharedBytes, stream,
                                         s.pack, images, floats);
  if (status != cudaSuccess) return status;
  status = launch_persistent(covariance_means_kernel, s.means.tiles, kBlockThreads, kLineSharedBytes, stream, s.means,
                             images, floats);
  if (status != cudaSuccess) return status;
  if ((status = launch_tiles<MmaMode::kTf32>(s, floats, stream)) != cudaSuccess) return status;
  if ((status = launch_tiles<MmaMode::kBFloat16>(s, floats, stream)) != cudaSuccess) return status;
  if ((status = launch_tiles<MmaMode::kSplit>(s, floats, stream)) != cudaSuccess) return status;
  if ((status = launch_tiles<MmaMode::kFloat16>(s, floats, stream)) != cudaSuccess) return status;
  status = launch_persistent(covariance_lanes_kernel, s.lanes.tiles, kBlockThreads, kLineSharedBytes, stream, s.lanes,
                             floats);
  if (status != cudaSuccess) return status;
  status = launch_persistent(covariance_reduce_kernel, s.reduce.tiles, kBlockThreads, 0, stream, s.reduce, floats);
  if (status != cudaSuccess) return status;
  return launch_persistent(covariance_expand_kernel, s.expand.tiles, kBlockThreads, kExpandSharedBytes, stream, s, outs,
                           results);
}

std::vector<KernelInfo> covariance_kernels() {
  const auto info = [](const char* name, auto* kernel, int shared) {
    return KernelInfo{name, reinterpret_cast<const void*>(kernel), kBlockThreads, shared};
  };
  return {info("covariance_pack_kernel", covariance_pack_kernel, kPackSharedBytes),
          info("covariance_means_kernel", covariance_means_kernel, kLineSharedBytes),
          info("covariance_tiles_kernel<0>", covariance_tiles_kernel<MmaMode::kTf32>, kTileSharedBytes),
          info("covariance_tiles_kernel<1>", covariance_tiles_kernel<MmaMode::kBFloat16>, kTileSharedBytes),
          info("covariance_tiles_kernel<2>", covariance_tiles_kernel<MmaMode::kSplit>, kTileSharedBytes),
          info("covariance_tiles_kernel<3>", covariance_tiles_kernel<MmaMode::kFloat16>, kTileSharedBytes),
          info("covariance_wide_tiles_kernel<0>", covariance_wide_tiles_kernel<MmaMode::kTf32>, kWideSharedBytes),
          info("covariance_wide_tiles_kernel<1>", covariance_wide_tiles_kernel<MmaMode::kBFloat16>, kWideSharedBytes),
          info("covariance_wide_tiles_kernel<3>", covariance_wide_tiles_kernel<MmaMode::kFloat16>, kWideSharedBytes),
          info("covariance_lanes_kernel", covariance_lanes_kernel, kLineSharedBytes),
          info("covariance_reduce_kernel", covariance_reduce_kernel, 0),
          info("covariance_expand_kernel", covariance_expand_kernel, kExpandSharedBytes)};
}

}  // namespace kfac
