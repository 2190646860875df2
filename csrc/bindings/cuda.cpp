// What of CUDA is compiled in, and whether it can run on a device.
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "register.h"
#ifdef KFAC_WITH_CUDA
#include "covariance.h"
#include "greedy.h"
#include "inverse.h"
#include "power_iteration.h"
#include "power_iteration_covariance.h"
#include "saliency.h"
#endif

namespace py = pybind11;

namespace {

#ifdef KFAC_WITH_CUDA
std::vector<kfac::KernelInfo> all_kernels() {
  std::vector<kfac::KernelInfo> result;
  for (const auto& family : {kfac::covariance_kernels(), kfac::inverse_kernels(), kfac::power_iteration_kernels(),
                             kfac::covariance_power_kernels(), kfac::saliency_kernels(), kfac::greedy_kernels()}) {
    result.insert(result.end(), family.begin(), family.end());
  }
  return result;
}
#endif

std::vector<std::string> architectures() {
  std::vector<std::string> result;
#ifdef KFAC_WITH_CUDA
  std::string word;
  for (const char letter : std::string(KFAC_CUDA_ARCHITECTURES) + " ") {
    if (letter != ' ') {
      word += letter;
    } else if (!word.empty()) {
      result.push_back(std::exchange(word, {}));
    }
  }
#endif
  return result;
}

// Why no kernel can run on this device: an old driver, an architecture that is not compiled for; empty if they can.
std::string device_problem(int device) {
#ifdef KFAC_WITH_CUDA
  const kfac::DeviceGuard guard(device);
  cudaError_t status = guard.status();
  for (const kfac::KernelInfo& kernel : all_kernels()) {
    if (status != cudaSuccess) break;
    cudaFuncAttributes attributes;
    status = cudaFuncGetAttributes(&attributes, kernel.function);
  }
  if (status == cudaSuccess) return "";
  cudaGetLastError();  // the next call is not to find it
  return std::string(cudaGetErrorName(status)) + ": " + cudaGetErrorString(status);
#else
  return device < 0 ? "no such device" : "no CUDA kernels in this build";
#endif
}

py::list kernels() {
  py::list result;
#ifdef KFAC_WITH_CUDA
  for (const kfac::KernelInfo& kernel : all_kernels()) {
    result.append(py::make_tuple(kernel.name, kernel.threads, kernel.shared_bytes));
  }
#endif
  return result;
}

}  // namespace

void register_cuda(py::module_& m) {
  m.def("cuda_architectures", architectures);
  m.def("cuda_device_problem", device_problem);
  m.def("cuda_kernels", kernels);
  m.def("build_directory", [] { return KFAC_BUILD_DIRECTORY; });
#ifdef KFAC_WITH_CUDA
  m.attr("cuda_compiler") = KFAC_CUDA_COMPILER;
#else
  m.attr("cuda_compiler") = "";
#endif
}
