#include "kfac/inverse.h"

#include <pybind11/stl.h>

#include <array>

#include "register.h"

namespace py = pybind11;

void register_inverse(py::module_& m) {
  // problems: (matrix, n, row stride, diagonal, inverse); returns the info of each
  m.def("damped_inverse_cpu", [](const std::vector<std::array<int64_t, 5>>& problems,
                                 const std::vector<double>& damping, int dtype, int threads) {
    std::vector<kfac::InverseProblem> list;
    for (size_t i = 0; i < problems.size(); ++i) {
      const auto& p = problems[i];
      list.push_back({reinterpret_cast<const void*>(p[0]), p[1], p[2], damping[i], reinterpret_cast<const void*>(p[3]),
                      reinterpret_cast<void*>(p[4]), 0});
    }
    {
      const py::gil_scoped_release no_gil;
      kfac::damped_inverse_cpu(list.data(), int64_t(list.size()), static_cast<kfac::DType>(dtype), threads);
    }
    std::vector<int> infos;
    for (const kfac::InverseProblem& problem : list) infos.push_back(problem.info);
    return infos;
  });
}
