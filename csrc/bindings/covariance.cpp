#include "kfac/covariance.h"

#include <pybind11/stl.h>

#include <array>
#include <map>
#include <string>
#include <tuple>

#include "conv_shape.h"
#include "kfac/covariance_group.h"
#include "register.h"
#include "without_gil.h"
#ifdef KFAC_WITH_CUDA
#include "covariance.h"
#include "cuda_call.h"
#endif

namespace py = pybind11;

namespace {

kfac::CovarianceMode covariance_mode(bool reduce) {
  return reduce ? kfac::CovarianceMode::kReduce : kfac::CovarianceMode::kExpand;
}

// dtype, strides of [N, C, H, W], shape as in conv_shape, reduce, algorithm, bias, precision
using Problem = std::tuple<int, std::array<int64_t, 4>, ConvShapeNumbers, bool, int, bool, int>;

kfac::CovarianceGroup covariance_group(const std::vector<Problem>& specs, int64_t least_wide_tiles) {
  std::vector<kfac::CovarianceProblem> problems;
  for (const auto& [dtype, strides, shape, reduce, algorithm, bias, precision] : specs) {
    problems.push_back({static_cast<kfac::DType>(dtype), strides[0], strides[1], strides[2], strides[3],
                        kfac::checked_shape(conv_shape(shape)), covariance_mode(reduce),
                        static_cast<kfac::CovarianceAlgorithm>(algorithm), bias,
                        static_cast<kfac::Precision>(precision)});
  }
  return kfac::CovarianceGroup(problems, least_wide_tiles);
}

#ifdef KFAC_WITH_CUDA
// Pointers of the layers in the order of the group; all on `device`.
void covariance_cuda(const kfac::CovarianceGroup& group, uintptr_t descriptors, uintptr_t workspace,
                     const std::vector<uintptr_t>& images, const std::vector<uintptr_t>& outs,
                     const std::vector<double>& decays, const std::vector<double>& scales, int device,
                     uintptr_t stream) {
  kfac::PackPointers sources{};
  kfac::ExpandPointers targets{};
  for (int layer = 0; layer < group.layers(); ++layer) {
    sources.image[layer] = reinterpret_cast<const void*>(images.at(layer));
    targets.out[layer] = reinterpret_cast<float*>(outs.at(layer));
    targets.decay[layer] = static_cast<float>(decays.at(layer));
    targets.scale[layer] = static_cast<float>(scales.at(layer));
  }
  cuda_call("covariance_cuda", device, [&] {
    return kfac::covariance_cuda(group, reinterpret_cast<const void*>(descriptors), reinterpret_cast<void*>(workspace),
                                 sources, targets, reinterpret_cast<cudaStream_t>(stream));
  });
}
#endif

}  // namespace

void register_covariance(py::module_& m) {
  m.def("covariance_cpu",
        [](uintptr_t image, int dtype, const std::array<int64_t, 4>& strides, const ConvShapeNumbers& shape,
           bool reduce, int algorithm, bool bias, double decay, double scale, uintptr_t out, int threads) {
          without_gil([&] {
            kfac::covariance_cpu(image_view(image, dtype, strides), conv_shape(shape), covariance_mode(reduce),
                                 static_cast<kfac::CovarianceAlgorithm>(algorithm), bias, decay, scale,
                                 reinterpret_cast<void*>(out), threads);
          });
        });
  // kinds of work of the two algorithms, and what each takes, by instruction set
  m.def("covariance_work", [](const ConvShapeNumbers& shape) {
    const kfac::CovarianceWork work = kfac::covariance_work(kfac::checked_shape(conv_shape(shape)));
    return py::make_tuple(work.shift, work.patches);
  });
  // plans of the shift structure that are kept, and their bytes
  m.def("plan_cache", [] {
    const kfac::PlanCache cache = kfac::plan_cache();
    return py::make_tuple(cache.plans, cache.bytes);
  });
  py::dict weights;
  weights["avx512"] = py::make_tuple(kfac::kWideWeights.shift, kfac::kWideWeights.patches);
  weights["avx2"] = py::make_tuple(kfac::kNarrowWeights.shift, kfac::kNarrowWeights.patches);
  m.attr("covariance_weights") = weights;
  py::class_<kfac::CovarianceGroup>(m, "CovarianceGroup")
      .def(py::init(&covariance_group), py::arg("problems"), py::arg("least_wide_tiles") = kfac::kLeastWideTiles)
      .def_property_readonly("workspace_bytes", &kfac::CovarianceGroup::workspace_bytes)
      .def("counts",
           [](const kfac::CovarianceGroup& group) {
             const kfac::CovarianceCounts& c = group.counts();
             return std::map<std::string, double>{{"products", c.products}, {"inputs", c.inputs},
                                                  {"packed", c.packed},     {"tile_reads", c.tile_reads},
                                                  {"slots", c.slots},       {"outputs", c.outputs}};
           })
      .def("descriptors", [](const kfac::CovarianceGroup& group) {
        return py::bytes(group.descriptors().data(), group.descriptors().size());
      });
  m.attr("max_group_layers") = kfac::kMaxGroupLayers;
#ifdef KFAC_WITH_CUDA
  m.def("covariance_cuda", covariance_cuda, py::call_guard<py::gil_scoped_release>());
#endif
}
