#include "kfac/saliency.h"

#include <pybind11/stl.h>

#include <array>

#include "register.h"

namespace py = pybind11;

namespace {

const void* input(int64_t address) {
  return reinterpret_cast<const void*>(address);
}

}  // namespace

void register_saliency(py::module_& m) {
  // problems: (weight, outputs, columns, row stride, A or H, row stride, G, row stride, block, scores);
  // returns for each the first neuron whose block is not positive definite, or -1
  m.def("saliency_cpu", [](const std::vector<std::array<int64_t, 10>>& problems, bool obs, int dtype, int threads) {
    std::vector<kfac::SaliencyProblem> list;
    for (const auto& p : problems) {
      list.push_back({input(p[0]), p[1], p[2], p[3], input(p[4]), p[5], input(p[6]), p[7], p[8],
                      reinterpret_cast<void*>(p[9]), -1});
    }
    {
      const py::gil_scoped_release no_gil;
      kfac::saliency_cpu(list.data(), int64_t(list.size()), obs ? kfac::Saliency::kObs : kfac::Saliency::kOutgoing,
                         static_cast<kfac::DType>(dtype), threads);
    }
    std::vector<int64_t> failed;
    for (const kfac::SaliencyProblem& problem : list) failed.push_back(problem.failed);
    return failed;
  });
  // problems: (weight, outputs, row stride, H, row stride, gone, number, kept, number, out); returns the info of each
  m.def("compensate_cpu", [](const std::vector<std::array<int64_t, 10>>& problems, int dtype, int threads) {
    std::vector<kfac::CompensationProblem> list;
    for (const auto& p : problems) {
      list.push_back({input(p[0]), p[1], p[2], input(p[3]), p[4], static_cast<const int64_t*>(input(p[5])), p[6],
                      static_cast<const int64_t*>(input(p[7])), p[8], reinterpret_cast<void*>(p[9]), 0});
    }
    {
      const py::gil_scoped_release no_gil;
      kfac::compensate_cpu(list.data(), int64_t(list.size()), static_cast<kfac::DType>(dtype), threads);
    }
    std::vector<int64_t> infos;
    for (const kfac::CompensationProblem& problem : list) infos.push_back(problem.info);
    return infos;
  });
}
