#include "kfac/greedy.h"

#include <pybind11/stl.h>

#include <array>
#include <tuple>
#include <vector>

#include "register.h"

namespace py = pybind11;

namespace {

// (V, outputs, columns, row stride, H, row stride, G, row stride, removed, number, pending, number, capacity, lost,
// number) and a list of (columns, neurons, block, blocks, forms, scores)
using Layer = std::tuple<std::array<int64_t, 15>, std::vector<std::array<int64_t, 6>>>;

// (pending, change, failed column, failed list, failed neuron)
using Result = std::tuple<int64_t, double, int64_t, int64_t, int64_t>;

template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

std::vector<Result> greedy_remove_cpu(const std::vector<Layer>& layers, int dtype, int threads) {
  std::vector<std::vector<kfac::GreedyNeurons>> neurons;
  std::vector<kfac::GreedyProblem> problems;
  for (const auto& [v, lists] : layers) {
    neurons.emplace_back();
    for (const auto& n : lists) {
      neurons.back().push_back({pointer<const int64_t>(n[0]), n[1], n[2], pointer<double>(n[3]), pointer<double>(n[4]),
                                pointer<double>(n[5])});
    }
    problems.push_back({pointer<void>(v[0]),
                        v[1],
                        v[2],
                        v[3],
                        pointer<void>(v[4]),
                        v[5],
                        pointer<const void>(v[6]),
                        v[7],
                        pointer<int64_t>(v[8]),
                        v[9],
                        pointer<void>(v[10]),
                        v[11],
                        v[12],
                        pointer<const int64_t>(v[13]),
                        v[14],
                        nullptr,
                        int64_t(lists.size()),
                        0.0,
                        -1,
                        -1,
                        -1});
  }
  for (size_t i = 0; i < problems.size(); ++i) problems[i].neurons = neurons[i].data();
  {
    const py::gil_scoped_release no_gil;
    kfac::greedy_remove_cpu(problems.data(), int64_t(problems.size()), static_cast<kfac::DType>(dtype), threads);
  }
  std::vector<Result> results;
  for (const kfac::GreedyProblem& p : problems) {
    results.emplace_back(p.pending_count, p.change, p.failed_column, p.failed_list, p.failed_neuron);
  }
  return results;
}

}  // namespace

void register_greedy(py::module_& m) {
  m.def("greedy_remove_cpu", greedy_remove_cpu);
}
