// A stand-in for the CUDA half of kfac_ext._C: the same functions, the same kernels, run by simulated threads on the
// CPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <utility>

#include "../../csrc/bindings/greedy_layers.h"
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
  // a device of 5 blocks with 48 KB each
  m.def("power_iteration_device", [](int) { return std::pair<int, int>(5, 48 << 10); });
  m.def("power_iteration_cuda", [](const kfac::PowerGroup& group, uintptr_t descriptors, uintptr_t workspace,
                                   const std::vector<uintptr_t>& matrices, const std::vector<uintptr_t>& vectors,
                                   double tol, int max_iter, const std::array<uintptr_t, 3>& results, int, uintptr_t) {
    kfac::PowerPointers pointers{};
    for (int64_t i = 0; i < group.matrices(); ++i) {
      pointers.matrix[i] = reinterpret_cast<const float*>(matrices.at(i));
      pointers.vector[i] = reinterpret_cast<float*>(vectors.at(i));
    }
    emulate_power_iteration(group, reinterpret_cast<const void*>(descriptors), reinterpret_cast<float*>(workspace),
                            pointers, {tol, max_iter},
                            {reinterpret_cast<float*>(results[0]), reinterpret_cast<float*>(results[1]),
                             reinterpret_cast<int32_t*>(results[2])},
                            simulated::Order::kForward);
  });
  m.def("covariance_power_blocks", [](int64_t, int) { return 5; });
  m.def("covariance_power_iteration_cuda",
        [](const kfac::CovariancePowerGroup& group, uintptr_t image, uintptr_t vector, uintptr_t workspace, double tol,
           int max_iter, const std::array<uintptr_t, 3>& results, int, uintptr_t) {
          emulate_covariance_power(group, reinterpret_cast<const void*>(image), reinterpret_cast<float*>(vector),
                                   reinterpret_cast<float*>(workspace), {tol, max_iter},
                                   {reinterpret_cast<float*>(results[0]), reinterpret_cast<float*>(results[1]),
                                    reinterpret_cast<int32_t*>(results[2])},
                                   simulated::Order::kForward);
        });
  m.def("damped_inverse_cuda",
        [](const kfac::InverseGroup& group, uintptr_t descriptors, uintptr_t workspace,
           const std::vector<std::array<uintptr_t, 3>>& pointers, uintptr_t amounts, uintptr_t info, int, uintptr_t) {
          kfac::InversePointers list{};
          for (int64_t i = 0; i < group.matrices(); ++i) {
            list.matrix[i] = reinterpret_cast<const float*>(pointers.at(i)[0]);
            list.diagonal[i] = reinterpret_cast<const float*>(pointers.at(i)[1]);
            list.inverse[i] = reinterpret_cast<float*>(pointers.at(i)[2]);
          }
          emulate_inverse(group, reinterpret_cast<const void*>(descriptors), reinterpret_cast<float*>(workspace), list,
                          {reinterpret_cast<const double*>(amounts), reinterpret_cast<int32_t*>(info)}, {});
        });
  m.def("pi_damping_cuda",
        [](const std::vector<std::array<int64_t, 8>>& pairs, double damping, uintptr_t amounts, int, uintptr_t) {
          emulate_pi_damping(kfac::pi_pairs(pairs), damping, reinterpret_cast<double*>(amounts));
        });
  m.def("greedy_remove_cuda", [](const std::vector<GreedyNumbers>& layers, uintptr_t workspace, int64_t changes,
                                 int64_t failures, int, uintptr_t) {
    std::vector<kfac::GreedyJob> jobs;
    std::vector<std::vector<kfac::GreedyList>> lists;
    float* place = reinterpret_cast<float*>(workspace);
    for (const auto& [v, neurons] : layers) {
      jobs.push_back(greedy_job(v, int32_t(jobs.size()), int32_t(layers.size()), changes, failures));
      kfac::place_greedy(jobs.back(), place);
      place += kfac::greedy_workspace(jobs.back());
      lists.emplace_back();
      for (const auto& n : neurons) lists.back().push_back(greedy_list(n));
    }
    // forward and backward in turn: what races would differ from the reference in one of them
    static bool backward = false;
    backward = !backward;
    emulate_greedy(jobs, lists, {backward ? simulated::Order::kBackward : simulated::Order::kForward});
  });
  m.def("saliency_cuda",
        [](const kfac::SaliencyGroup& group, uintptr_t descriptors,
           const std::vector<std::array<uintptr_t, 4>>& pointers, bool obs, uintptr_t flags, int, uintptr_t) {
          kfac::SaliencyPointers list{};
          for (int64_t i = 0; i < group.layers(); ++i) {
            list.weight[i] = reinterpret_cast<const float*>(pointers.at(i)[0]);
            list.input[i] = reinterpret_cast<const float*>(pointers.at(i)[1]);
            list.G[i] = reinterpret_cast<const float*>(pointers.at(i)[2]);
            list.scores[i] = reinterpret_cast<float*>(pointers.at(i)[3]);
          }
          emulate_saliency(group, reinterpret_cast<const void*>(descriptors), list,
                           obs ? kfac::Saliency::kObs : kfac::Saliency::kObd, reinterpret_cast<int32_t*>(flags), {});
        });
}
