// Calling a launcher from Python: on which device, and what becomes of its error.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "launch.h"

// Runs `launch` with `device` current; raises what it returns, named after `operation`.
template <class Launch>
void cuda_call(const char* operation, int device, const Launch& launch) {
  const kfac::DeviceGuard guard(device);
  cudaError_t status = guard.status();
  if (status == cudaSuccess) status = launch();
  if (status == cudaSuccess) return;
  cudaGetLastError();  // it is raised here, and not to be found by the next call
  throw std::runtime_error(std::string(operation) + ": " + cudaGetErrorName(status) + ", " +
                           cudaGetErrorString(status));
}
