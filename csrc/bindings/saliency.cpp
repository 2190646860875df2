#include "kfac/saliency.h"

#include <pybind11/stl.h>

#include <array>
#include <map>
#include <string>

#include "kfac/saliency_group.h"
#include "register.h"
#include "without_gil.h"
#ifdef KFAC_WITH_CUDA
#include "cuda_call.h"
#include "saliency.h"
#endif

namespace py = pybind11;

namespace {

const void* input(int64_t address) {
  return reinterpret_cast<const void*>(address);
}

// layers: outputs, columns, block, row strides of V, of A or H, and of G
kfac::SaliencyGroup saliency_group(const std::vector<std::array<int64_t, 6>>& layers) {
  std::vector<kfac::SaliencyLayer> list;
  for (const auto& v : layers) list.push_back({v[0], v[1], v[2], v[3], v[4], v[5]});
  return kfac::SaliencyGroup(list);
}

#ifdef KFAC_WITH_CUDA
// pointers: (V, A or H, G, scores) of each layer in the order of the group; flags: 0 unless obs
void saliency_cuda(const kfac::SaliencyGroup& group, uintptr_t descriptors,
                   const std::vector<std::array<uintptr_t, 4>>& pointers, bool obs, uintptr_t flags, int device,
                   uintptr_t stream) {
  kfac::SaliencyPointers list{};
  for (int64_t i = 0; i < group.layers(); ++i) {
    list.weight[i] = reinterpret_cast<const float*>(pointers.at(i)[0]);
    list.input[i] = reinterpret_cast<const float*>(pointers.at(i)[1]);
    list.G[i] = reinterpret_cast<const float*>(pointers.at(i)[2]);
    list.scores[i] = reinterpret_cast<float*>(pointers.at(i)[3]);
  }
  cuda_call("saliency_cuda", device, [&] {
    return kfac::saliency_cuda(group, reinterpret_cast<const void*>(descriptors), list,
                               obs ? kfac::Saliency::kObs : kfac::Saliency::kObd, reinterpret_cast<int32_t*>(flags),
                               reinterpret_cast<cudaStream_t>(stream));
  });
}
#endif

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
    without_gil([&] {
      kfac::saliency_cpu(list.data(), int64_t(list.size()), obs ? kfac::Saliency::kObs : kfac::Saliency::kObd,
                         static_cast<kfac::DType>(dtype), threads);
    });
    std::vector<int64_t> failed;
    for (const kfac::SaliencyProblem& problem : list) failed.push_back(problem.failed);
    return failed;
  });
  // problems: (weight, outputs, row stride, H, row stride, pruned, number, kept, number, out); returns the info of each
  m.def("compensate_cpu", [](const std::vector<std::array<int64_t, 10>>& problems, int dtype, int threads) {
    std::vector<kfac::CompensationProblem> list;
    for (const auto& p : problems) {
      list.push_back({input(p[0]), p[1], p[2], input(p[3]), p[4], static_cast<const int64_t*>(input(p[5])), p[6],
                      static_cast<const int64_t*>(input(p[7])), p[8], reinterpret_cast<void*>(p[9]), 0});
    }
    without_gil(
        [&] { kfac::compensate_cpu(list.data(), int64_t(list.size()), static_cast<kfac::DType>(dtype), threads); });
    std::vector<int64_t> infos;
    for (const kfac::CompensationProblem& problem : list) infos.push_back(problem.info);
    return infos;
  });
  py::class_<kfac::SaliencyGroup>(m, "SaliencyGroup")
      .def(py::init(&saliency_group))
      .def("counts",
           [](const kfac::SaliencyGroup& group) {
             return std::map<std::string, double>{{"products", group.products()}, {"tiles", double(group.tiles())}};
           })
      .def("descriptors", [](const kfac::SaliencyGroup& group) {
        return py::bytes(group.descriptors().data(), group.descriptors().size());
      });
  m.attr("max_saliency_layers") = kfac::kMaxSaliencyLayers;
  m.attr("max_saliency_block") = kfac::kSaliencyEdge;
#ifdef KFAC_WITH_CUDA
  m.def("saliency_cuda", saliency_cuda, py::call_guard<py::gil_scoped_release>());
#endif
}
