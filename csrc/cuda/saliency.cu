#include "device_block.cuh"
#include "saliency.cuh"
#include "saliency.h"

namespace kfac {
namespace {

template <Saliency kKind>
__global__ void __launch_bounds__(kSaliencyThreads, 2)
    saliency_kernel(const JobList<SaliencyJob> list, const __grid_constant__ SaliencyPointers pointers,
                    int32_t* flags) {
  DeviceBlock block;
  saliency<kKind>(block, list, pointers, flags);
}

}  // namespace

cudaError_t saliency_cuda(const SaliencyGroup& group, const void* descriptors, const SaliencyPointers& pointers,
                          Saliency kind, int32_t* flags, cudaStream_t stream) {
  const JobList<SaliencyJob> list = group.schedule(descriptors);
  const auto kernel = kind == Saliency::kObs ? saliency_kernel<Saliency::kObs> : saliency_kernel<Saliency::kObd>;
  return launch_persistent(kernel, list.tiles, kSaliencyThreads, kSaliencySharedBytes, stream, list, pointers, flags);
}

std::vector<KernelInfo> saliency_kernels() {
  const auto info = [](const char* name, auto* kernel) {
    return KernelInfo{name, reinterpret_cast<const void*>(kernel), kSaliencyThreads, kSaliencySharedBytes};
  };
  return {info("saliency_kernel<0>", saliency_kernel<Saliency::kObd>),
          info("saliency_kernel<1>", saliency_kernel<Saliency::kObs>)};
}

}  // namespace kfac
