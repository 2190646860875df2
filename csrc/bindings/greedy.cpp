#include "kfac/greedy.h"

#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "greedy_layers.h"
#include "register.h"
#include "without_gil.h"
#ifdef KFAC_WITH_CUDA
#include "cuda_call.h"
#include "greedy.h"
#endif

namespace py = pybind11;

namespace {

// (pending, change, failed column, failed list, failed neuron)
using Result = std::tuple<int64_t, double, int64_t, int64_t, int64_t>;

std::vector<Result> greedy_remove_cpu(const std::vector<GreedyNumbers>& layers, int dtype, int threads) {
  std::vector<std::vector<kfac::GreedyNeurons>> neurons;
  std::vector<kfac::GreedyProblem> problems;
  for (const auto& [v, lists] : layers) {
    neurons.emplace_back();
    for (const auto& n : lists) {
      neurons.back().push_back({greedy_pointer<const int64_t>(n[0]), n[1], n[2], greedy_pointer<double>(n[3]),
                                greedy_pointer<double>(n[4]), greedy_pointer<double>(n[5])});
    }
    problems.push_back({greedy_pointer<void>(v[0]),
                        v[1],
                        v[2],
                        v[3],
                        greedy_pointer<void>(v[4]),
                        v[5],
                        greedy_pointer<const void>(v[6]),
                        v[7],
                        greedy_pointer<int64_t>(v[8]),
                        v[9],
                        greedy_pointer<void>(v[10]),
                        v[11],
                        v[12],
                        greedy_pointer<const int64_t>(v[13]),
                        v[14],
                        nullptr,
                        int64_t(lists.size()),
                        0.0,
                        -1,
                        -1,
                        -1});
  }
  for (size_t i = 0; i < problems.size(); ++i) problems[i].neurons = neurons[i].data();
  without_gil([&] {
    kfac::greedy_remove_cpu(problems.data(), int64_t(problems.size()), static_cast<kfac::DType>(dtype), threads);
  });
  std::vector<Result> results;
  for (const kfac::GreedyProblem& p : problems) {
    results.emplace_back(p.pending_count, p.change, p.failed_column, p.failed_list, p.failed_neuron);
  }
  return results;
}

#ifdef KFAC_WITH_CUDA
// workspace: greedy_floats floats; changes: a double a layer; failures: three int64 a layer
void greedy_remove_cuda(const std::vector<GreedyNumbers>& layers, uintptr_t workspace, int64_t changes,
                        int64_t failures, int device, uintptr_t stream) {
  std::vector<kfac::GreedyLayer> list;
  float* place = reinterpret_cast<float*>(workspace);
  for (const auto& [v, neurons] : layers) {
    list.push_back({greedy_job(v, int32_t(list.size()), int32_t(layers.size()), changes, failures), {}});
    kfac::place_greedy(list.back().job, place);
    place += kfac::greedy_workspace(list.back().job);
    for (const auto& n : neurons) list.back().lists.push_back(greedy_list(n));
  }
  cuda_call("greedy_remove_cuda", device,
            [&] { return kfac::greedy_remove_cuda(list, reinterpret_cast<cudaStream_t>(stream)); });
}
#endif

}  // namespace

void register_greedy(py::module_& m) {
  m.def("greedy_remove_cpu", greedy_remove_cpu);
  m.def("greedy_floats", greedy_floats);
  m.attr("max_greedy_block") = kfac::kMaxGreedyBlock;
#ifdef KFAC_WITH_CUDA
  m.def("greedy_remove_cuda", greedy_remove_cuda, py::call_guard<py::gil_scoped_release>());
#endif
}
