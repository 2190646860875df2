// Starting kernels. A launcher returns the first error; nothing here waits for the device.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace kfac {

struct KernelInfo {
  const char* name;
  const void* function;
  int threads, shared_bytes;  // dynamic shared memory
};

// Makes `device` current until the end of the scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : status_(cudaGetDevice(&before_)) {
    if (status_ == cudaSuccess && device != before_) status_ = cudaSetDevice(device);
  }
  ~DeviceGuard() {
    int now = before_;
    if (cudaGetDevice(&now) == cudaSuccess && now != before_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t status() const { return status_; }

 private:
  int before_ = 0;
  cudaError_t status_;
};

// Lets a kernel have all the shared memory that a block of the current device may have: `bytes`. Threads that launch it
// at once all set the same limit, so none lowers what another needs.
inline cudaError_t reserve_shared(const void* function, int* bytes) {
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status != cudaSuccess) return status;
  return cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, *bytes);
}

// Starts as many blocks as the device holds at once, or one a tile if there are fewer tiles; the kernel loops.
template <class... Parameters>
cudaError_t launch_persistent(void (*kernel)(Parameters...), int32_t tiles, int threads, int shared_bytes,
                              cudaStream_t stream, const Parameters&... arguments) {
  if (tiles == 0) return cudaSuccess;
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaError_t status = cudaSuccess;
  if (shared_bytes > 48 << 10) {
    status = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (status != cudaSuccess) return status;
  }
  int device = 0, processors = 0, resident = 0;
  if ((status = cudaGetDevice(&device)) != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, function, threads, shared_bytes);
  if (status != cudaSuccess) return status;
  if (resident == 0) return cudaErrorLaunchOutOfResources;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(tiles < processors * resident ? tiles : processors * resident));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Starts `blocks` blocks that meet: the driver refuses what would not be resident at once, and would wait for ever.
template <class... Parameters>
cudaError_t launch_cooperative(void (*kernel)(Parameters...), int32_t blocks, int threads, int shared_bytes,
                               cudaStream_t stream, const Parameters&... arguments) {
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &cooperative;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace kfac
