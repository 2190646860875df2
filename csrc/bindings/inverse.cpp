#include "kfac/inverse.h"

#include <pybind11/stl.h>

#include <array>
#include <map>
#include <string>

#include "kfac/inverse_group.h"
#include "register.h"
#include "without_gil.h"
#ifdef KFAC_WITH_CUDA
#include "cuda_call.h"
#include "inverse.h"
#endif

namespace py = pybind11;

namespace {

// shapes: (n, row stride)
kfac::InverseGroup inverse_group(const std::vector<std::array<int64_t, 2>>& shapes) {
  std::vector<kfac::InverseShape> list;
  for (const auto& [n, stride] : shapes) list.push_back({n, stride});
  return kfac::InverseGroup(list);
}

#ifdef KFAC_WITH_CUDA
// pointers: (matrix, diagonal or 0, inverse) of each matrix in the order of the group
void damped_inverse_cuda(const kfac::InverseGroup& group, uintptr_t descriptors, uintptr_t workspace,
                         const std::vector<std::array<uintptr_t, 3>>& pointers, uintptr_t amounts, uintptr_t info,
                         int device, uintptr_t stream) {
  kfac::InversePointers list{};
  for (int64_t i = 0; i < group.matrices(); ++i) {
    list.matrix[i] = reinterpret_cast<const float*>(pointers.at(i)[0]);
    list.diagonal[i] = reinterpret_cast<const float*>(pointers.at(i)[1]);
    list.inverse[i] = reinterpret_cast<float*>(pointers.at(i)[2]);
  }
  cuda_call("damped_inverse_cuda", device, [&] {
    return kfac::damped_inverse_cuda(group, reinterpret_cast<const void*>(descriptors),
                                     reinterpret_cast<void*>(workspace), list,
                                     {reinterpret_cast<const double*>(amounts), reinterpret_cast<int32_t*>(info)},
                                     reinterpret_cast<cudaStream_t>(stream));
  });
}

void pi_damping_cuda(const std::vector<std::array<int64_t, 8>>& pairs, double damping, uintptr_t amounts, int device,
                     uintptr_t stream) {
  const kfac::PiPairs list = kfac::pi_pairs(pairs);
  cuda_call("pi_damping_cuda", device, [&] {
    return kfac::pi_damping_cuda(list, damping, reinterpret_cast<double*>(amounts),
                                 reinterpret_cast<cudaStream_t>(stream));
  });
}
#endif

}  // namespace

void register_inverse(py::module_& m) {
  // problems: (matrix, n, row stride, diagonal, inverse); returns the info of each
  m.def("damped_inverse_cpu", [](const std::vector<std::array<int64_t, 5>>& problems,
                                 const std::vector<double>& damping, int dtype, int threads) {
    std::vector<kfac::InverseProblem> list;
    for (size_t i = 0; i < problems.size(); ++i) {
      const auto& p = problems[i];
      list.push_back({reinterpret_cast<const void*>(p[0]), p[1], p[2], damping.at(i),
                      reinterpret_cast<const void*>(p[3]), reinterpret_cast<void*>(p[4]), 0});
    }
    without_gil(
        [&] { kfac::damped_inverse_cpu(list.data(), int64_t(list.size()), static_cast<kfac::DType>(dtype), threads); });
    std::vector<int> infos;
    for (const kfac::InverseProblem& problem : list) infos.push_back(problem.info);
    return infos;
  });
  py::class_<kfac::InverseGroup>(m, "InverseGroup")
      .def(py::init(&inverse_group))
      .def_property_readonly("workspace_bytes", &kfac::InverseGroup::workspace_bytes)
      .def("counts",
           [](const kfac::InverseGroup& group) {
             const kfac::InverseCounts c = group.counts();
             return std::map<std::string, double>{
                 {"products", c.products}, {"launches", double(c.launches)}, {"pivots", double(c.pivots)}};
           })
      .def("descriptors", [](const kfac::InverseGroup& group) {
        return py::bytes(group.descriptors().data(), group.descriptors().size());
      });
  m.attr("max_inverse_matrices") = kfac::kMaxInverseMatrices;
  m.attr("max_pi_pairs") = kfac::kMaxPiPairs;
#ifdef KFAC_WITH_CUDA
  m.def("damped_inverse_cuda", damped_inverse_cuda, py::call_guard<py::gil_scoped_release>());
  m.def("pi_damping_cuda", pi_damping_cuda, py::call_guard<py::gil_scoped_release>());
#endif
}
