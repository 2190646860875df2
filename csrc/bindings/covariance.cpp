#include "kfac/covariance.h"

#include <pybind11/stl.h>

#include <array>

#include "register.h"

namespace py = pybind11;

namespace {

// samples, channels, height, width, kernel, stride, padding (top, left), dilation, output size, groups
kfac::ConvShape conv_shape(const std::array<int64_t, 15>& v) {
  return {v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11], v[12], v[13], v[14]};
}

}  // namespace

void register_covariance(py::module_& m) {
  m.def("covariance_cpu", [](uintptr_t image, int dtype, const std::array<int64_t, 4>& strides,
                             const std::array<int64_t, 15>& shape, bool reduce, int algorithm, bool bias, double decay,
                             double scale, uintptr_t out, int threads) {
    const kfac::ImageView view{reinterpret_cast<const void*>(image),
                               static_cast<kfac::DType>(dtype),
                               strides[0],
                               strides[1],
                               strides[2],
                               strides[3]};
    const py::gil_scoped_release no_gil;
    kfac::covariance_cpu(
        view, conv_shape(shape), reduce ? kfac::CovarianceMode::kReduce : kfac::CovarianceMode::kExpand,
        static_cast<kfac::CovarianceAlgorithm>(algorithm), bias, decay, scale, reinterpret_cast<void*>(out), threads);
  });
  m.def("covariance_costs", [](const std::array<int64_t, 15>& shape) {
    const kfac::CovarianceCosts costs = kfac::covariance_costs(conv_shape(shape));
    return py::make_tuple(costs.shift, costs.patches);
  });
}
