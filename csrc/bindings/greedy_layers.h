// The layers of a step of greedy selection as Python passes them to a GPU.
#pragma once

#include <array>
#include <tuple>
#include <vector>

#include "kfac/greedy_group.h"

// (V, outputs, columns, row stride, H, row stride, G, row stride, removed, number, pending, number, capacity, lost,
// number) and a list of (columns, neurons, block, blocks, forms, scores)
using GreedyNumbers = std::tuple<std::array<int64_t, 15>, std::vector<std::array<int64_t, 6>>>;

template <class T>
T* greedy_pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

// Layer `layer` of `layers`, without its workspace.
inline kfac::GreedyJob greedy_job(const std::array<int64_t, 15>& v, int32_t layer, int32_t layers, int64_t changes,
                                  int64_t failures) {
  kfac::GreedyJob job{};
  job.V = greedy_pointer<float>(v[0]);
  job.outputs = int32_t(v[1]);
  job.columns = int32_t(v[2]);
  job.V_stride = v[3];
  job.H = greedy_pointer<float>(v[4]);
  job.H_stride = v[5];
  job.G = greedy_pointer<const float>(v[6]);
  job.G_stride = v[7];
  job.removed = greedy_pointer<int64_t>(v[8]);
  job.removed_count = int32_t(v[9]);
  job.pending = greedy_pointer<float>(v[10]);
  job.pending_count = int32_t(v[11]);
  job.pending_capacity = int32_t(v[12]);
  job.lost = greedy_pointer<const int64_t>(v[13]);
  job.q = int32_t(v[14]);
  job.change = greedy_pointer<double>(changes) + layer;
  job.failures = greedy_pointer<int64_t>(failures);
  job.layer = layer;
  job.layers = layers;
  return job;
}

inline kfac::GreedyList greedy_list(const std::array<int64_t, 6>& n) {
  return {greedy_pointer<const int64_t>(n[0]),
          int32_t(n[1]),
          int32_t(n[2]),
          greedy_pointer<double>(n[3]),
          greedy_pointer<double>(n[4]),
          greedy_pointer<double>(n[5])};
}

// Floats of the workspace of all layers.
inline int64_t greedy_floats(const std::vector<GreedyNumbers>& layers) {
  int64_t floats = 0;
  for (const auto& [v, lists] : layers) floats += kfac::greedy_workspace(greedy_job(v, 0, 1, 0, 0));
  return floats;
}
