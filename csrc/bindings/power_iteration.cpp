#include "kfac/power_iteration.h"

#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "register.h"

namespace py = pybind11;

namespace {

using Result = std::tuple<double, double, int>;  // eigenvalue, residual, iterations

Result result_of(const kfac::Eigenpair& pair) {
  return {pair.value, pair.residual, pair.iterations};
}

}  // namespace

void register_power_iteration(py::module_& m) {
  // problems: (matrix, n, row stride, vector)
  m.def("power_iteration_cpu",
        [](const std::vector<std::array<int64_t, 4>>& problems, int dtype, double tol, int max_iter, int threads) {
          std::vector<kfac::EigenProblem> list;
          for (const auto& p : problems) {
            list.push_back({reinterpret_cast<const void*>(p[0]), p[1], p[2], reinterpret_cast<void*>(p[3]), {}});
          }
          {
            const py::gil_scoped_release no_gil;
            kfac::power_iteration_cpu(list.data(), int64_t(list.size()), static_cast<kfac::DType>(dtype),
                                      {tol, max_iter}, threads);
          }
          std::vector<Result> results;
          for (const kfac::EigenProblem& problem : list) results.push_back(result_of(problem.result));
          return results;
        });
  // rows: number, columns, row stride, column stride
  m.def("row_covariance_power_iteration_cpu", [](uintptr_t x, int dtype, const std::array<int64_t, 4>& rows, bool bias,
                                                 uintptr_t vector, double tol, int max_iter, int threads) {
    const py::gil_scoped_release no_gil;
    return result_of(kfac::row_covariance_power_iteration_cpu(
        reinterpret_cast<const void*>(x), static_cast<kfac::DType>(dtype), rows[0], rows[1], rows[2], rows[3], bias,
        reinterpret_cast<void*>(vector), {tol, max_iter}, threads));
  });
  // shape as for covariance_cpu
  m.def("patch_covariance_power_iteration_cpu",
        [](uintptr_t image, int dtype, const std::array<int64_t, 4>& strides, const std::array<int64_t, 15>& v,
           bool bias, uintptr_t vector, double tol, int max_iter, int threads) {
          const kfac::ImageView view{reinterpret_cast<const void*>(image),
                                     static_cast<kfac::DType>(dtype),
                                     strides[0],
                                     strides[1],
                                     strides[2],
                                     strides[3]};
          const kfac::ConvShape shape{v[0], v[1], v[2],  v[3],  v[4],  v[5],  v[6], v[7],
                                      v[8], v[9], v[10], v[11], v[12], v[13], v[14]};
          const py::gil_scoped_release no_gil;
          return result_of(kfac::patch_covariance_power_iteration_cpu(
              view, shape, bias, reinterpret_cast<void*>(vector), {tol, max_iter}, threads));
        });
}
