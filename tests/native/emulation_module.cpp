// A stand-in for the CUDA half of kfac_ext._C: the same functions, the same kernels, run by simulated threads on the
// CPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "emulation.h"

namespace py = pybind11;

PYBIND11_MODULE(kfac_emulation, m) {
  m.def("covariance_cuda", [](const kfac::CovarianceGroup& group, uintptr_t descriptors, uintptr_t workspace,
                              const std::vector<uintptr_t>& images, const std::vector<uintptr_t>& outs,
                              const std::vector<double>& decays, const std::vector<double>& scales, int, uintptr_t) {
    kfac::PackPointers sources{};
    kfac::ExpandPointers targets{};
    for (int layer = 0; layer < group.layers(); ++layer) {
      sources.image[layer] = reinterpret_cast<const void*>(images.at(layer));
      targets.out[layer] = reinterpret_cast<float*>(outs.at(layer));
      targets.decay[layer] = static_cast<float>(decays.at(layer));
      targets.scale[layer] = static_cast<float>(scales.at(layer));
    }
    emulate_covariance(group, reinterpret_cast<const void*>(descriptors), reinterpret_cast<float*>(workspace), sources,
                       targets, {});
  });
}
