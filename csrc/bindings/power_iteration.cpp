#include "kfac/power_iteration.h"

#include <pybind11/stl.h>

#include <array>
#include <map>
#include <string>
#include <tuple>

#include "conv_shape.h"
#include "kfac/power_iteration_covariance_group.h"
#include "kfac/power_iteration_group.h"
#include "register.h"
#include "without_gil.h"
#ifdef KFAC_WITH_CUDA
#include "cuda_call.h"
#include "power_iteration.h"
#include "power_iteration_covariance.h"
#endif

namespace py = pybind11;

namespace {

using Result = std::tuple<double, double, int>;  // eigenvalue, residual, iterations

Result result_of(const kfac::Eigenpair& pair) {
  return {pair.value, pair.residual, pair.iterations};
}

template <class T>
void write_results(const std::vector<kfac::EigenProblem>& problems, const std::array<uintptr_t, 3>& results) {
  for (size_t i = 0; i < problems.size(); ++i) {
    const kfac::Eigenpair& pair = problems[i].result;
    reinterpret_cast<T*>(results[0])[i] = static_cast<T>(pair.value);
    reinterpret_cast<T*>(results[1])[i] = static_cast<T>(pair.residual);
    reinterpret_cast<int32_t*>(results[2])[i] = pair.iterations;
  }
}

// shapes: (n, row stride), for a device that holds `blocks` blocks of `shared_bytes` at once
kfac::PowerGroup power_group(const std::vector<std::array<int64_t, 2>>& shapes, int64_t blocks, int64_t shared_bytes) {
  std::vector<kfac::MatrixShape> list;
  for (const auto& [n, stride] : shapes) list.push_back({n, stride});
  return kfac::PowerGroup(list, blocks, shared_bytes);
}

kfac::CovariancePowerGroup covariance_power_group(int dtype, const std::array<int64_t, 4>& strides,
                                                  const ConvShapeNumbers& shape, bool bias, int64_t blocks) {
  return kfac::CovariancePowerGroup({static_cast<kfac::DType>(dtype), strides[0], strides[1], strides[2], strides[3],
                                     kfac::checked_shape(conv_shape(shape)), kfac::CovarianceMode::kExpand,
                                     kfac::CovarianceAlgorithm::kPatches, bias, kfac::Precision::kFloat32},
                                    blocks);
}

#ifdef KFAC_WITH_CUDA
kfac::PowerResults power_results(const std::array<uintptr_t, 3>& results) {
  return {reinterpret_cast<float*>(results[0]), reinterpret_cast<float*>(results[1]),
          reinterpret_cast<int32_t*>(results[2])};
}

std::pair<int, int> power_iteration_device(int device) {
  kfac::PowerDevice found{};
  cuda_call("power_iteration_device", device, [&] { return kfac::power_iteration_device(&found); });
  return {found.blocks, found.shared_bytes};
}

void power_iteration_cuda(const kfac::PowerGroup& group, uintptr_t descriptors, uintptr_t workspace,
                          const std::vector<uintptr_t>& matrices, const std::vector<uintptr_t>& vectors, double tol,
                          int max_iter, const std::array<uintptr_t, 3>& results, int device, uintptr_t stream) {
  kfac::PowerPointers pointers{};
  for (int64_t i = 0; i < group.matrices(); ++i) {
    pointers.matrix[i] = reinterpret_cast<const float*>(matrices.at(i));
    pointers.vector[i] = reinterpret_cast<float*>(vectors.at(i));
  }
  cuda_call("power_iteration_cuda", device, [&] {
    return kfac::power_iteration_cuda(group, reinterpret_cast<const void*>(descriptors),
                                      reinterpret_cast<void*>(workspace), pointers, {tol, max_iter},
                                      power_results(results), reinterpret_cast<cudaStream_t>(stream));
  });
}

int covariance_power_blocks(int64_t n, int device) {
  int blocks = 0;
  cuda_call("covariance_power_iteration", device, [&] { return kfac::covariance_power_blocks(n, &blocks); });
  return blocks;
}

void covariance_power_iteration_cuda(const kfac::CovariancePowerGroup& group, uintptr_t image, uintptr_t vector,
                                     uintptr_t workspace, double tol, int max_iter,
                                     const std::array<uintptr_t, 3>& results, int device, uintptr_t stream) {
  cuda_call("covariance_power_iteration", device, [&] {
    return kfac::covariance_power_iteration_cuda(group, reinterpret_cast<const void*>(image),
                                                 reinterpret_cast<float*>(vector), reinterpret_cast<void*>(workspace),
                                                 {tol, max_iter}, power_results(results),
                                                 reinterpret_cast<cudaStream_t>(stream));
  });
}
#endif

}  // namespace

void register_power_iteration(py::module_& m) {
  // problems: matrix, n, row stride and vector of one after the other, which pybind11 reads faster than lists in a
  // list; results: eigenvalues and residuals [L] of `dtype`, iterations [L] int32
  m.def("power_iteration_cpu", [](const std::vector<int64_t>& problems, int dtype, double tol, int max_iter,
                                  int threads, const std::array<uintptr_t, 3>& results) {
    without_gil([&] {
      std::vector<kfac::EigenProblem> list;
      for (auto p = problems.begin(); problems.end() - p >= 4; p += 4) {
        list.push_back({reinterpret_cast<const void*>(p[0]), p[1], p[2], reinterpret_cast<void*>(p[3]), {}});
      }
      const auto type = static_cast<kfac::DType>(dtype);
      kfac::power_iteration_cpu(list.data(), int64_t(list.size()), type, {tol, max_iter}, threads);
      (type == kfac::DType::kFloat64 ? write_results<double> : write_results<float>)(list, results);
    });
  });
  // rows: number, columns, row stride, column stride
  m.def("row_covariance_power_iteration_cpu", [](uintptr_t x, int dtype, const std::array<int64_t, 4>& rows, bool bias,
                                                 uintptr_t vector, double tol, int max_iter, int threads) {
    return without_gil([&] {
      return result_of(kfac::row_covariance_power_iteration_cpu(
          reinterpret_cast<const void*>(x), static_cast<kfac::DType>(dtype), rows[0], rows[1], rows[2], rows[3], bias,
          reinterpret_cast<void*>(vector), {tol, max_iter}, threads));
    });
  });
  // shape as for covariance_cpu
  m.def("patch_covariance_power_iteration_cpu", [](uintptr_t image, int dtype, const std::array<int64_t, 4>& strides,
                                                   const ConvShapeNumbers& shape, bool bias, uintptr_t vector,
                                                   double tol, int max_iter, int threads) {
    return without_gil([&] {
      return result_of(kfac::patch_covariance_power_iteration_cpu(image_view(image, dtype, strides), conv_shape(shape),
                                                                  bias, reinterpret_cast<void*>(vector),
                                                                  {tol, max_iter}, threads));
    });
  });
  py::class_<kfac::PowerGroup>(m, "PowerGroup")
      .def(py::init(&power_group))
      .def_property_readonly("workspace_bytes", &kfac::PowerGroup::workspace_bytes)
      .def("counts",
           [](const kfac::PowerGroup& group) {
             const kfac::PowerCounts& c = group.counts();
             return std::map<std::string, double>{{"entries", c.entries}, {"kept", c.kept}, {"most", c.most}};
           })
      .def("descriptors", [](const kfac::PowerGroup& group) {
        return py::bytes(group.descriptors().data(), group.descriptors().size());
      });
  py::class_<kfac::CovariancePowerGroup>(m, "CovariancePowerGroup")
      .def(py::init(&covariance_power_group))
      .def_property_readonly("workspace_bytes", &kfac::CovariancePowerGroup::workspace_bytes)
      .def_property_readonly("blocks", [](const kfac::CovariancePowerGroup& group) { return group.job().team.blocks; });
  m.def("power_fits", kfac::power_fits);
  m.attr("max_power_matrices") = kfac::kMaxPowerMatrices;
#ifdef KFAC_WITH_CUDA
  m.def("power_iteration_device", power_iteration_device);
  m.def("power_iteration_cuda", power_iteration_cuda, py::call_guard<py::gil_scoped_release>());
  m.def("covariance_power_blocks", covariance_power_blocks);
  m.def("covariance_power_iteration_cuda", covariance_power_iteration_cuda, py::call_guard<py::gil_scoped_release>());
#endif
}
