#include "kfac/saliency_group.h"

#include <stdexcept>
#include <string>

#include "descriptors.h"

namespace kfac {

SaliencyGroup::SaliencyGroup(const std::vector<SaliencyLayer>& layers) : layers_(int64_t(layers.size())) {
  if (layers.size() > kMaxSaliencyLayers) {
    throw std::invalid_argument("saliency: " + std::to_string(layers.size()) + " layers, expected at most " +
                                std::to_string(kMaxSaliencyLayers));
  }
  std::vector<SaliencyJob> jobs;
  std::vector<int32_t> first{0};
  int32_t neurons_before = 0;
  for (const SaliencyLayer& layer : layers) {
    if (layer.block < 1 || layer.block > kSaliencyEdge) {
      throw std::invalid_argument("saliency: a block of " + std::to_string(layer.block) + " columns, expected 1 to " +
                                  std::to_string(kSaliencyEdge));
    }
    const int32_t neurons = int32_t(layer.columns / layer.block), together = int32_t(kSaliencyEdge / layer.block);
    jobs.push_back({layer.weight_stride, layer.input_stride, layer.G_stride, int32_t(layer.outputs),
                    int32_t(layer.block), neurons, together, int32_t(jobs.size()), neurons_before});
    neurons_before += neurons;
    products_ += double(divide_up(neurons, together) * kSaliencyEdge) *
                 double(align_up(layer.outputs, int64_t(kSaliencyEdge)) * layer.outputs);
    first.push_back(first.back() + int32_t(divide_up(neurons, together)));
  }
  tiles_ = first.back();
  append(descriptors_, jobs);
  first_offset_ = append(descriptors_, first);
}

JobList<SaliencyJob> SaliencyGroup::schedule(const void* descriptors) const {
  const char* const base = static_cast<const char*>(descriptors);
  return {reinterpret_cast<const SaliencyJob*>(base), reinterpret_cast<const int32_t*>(base + first_offset_),
          int32_t(layers_), tiles_};
}

}  // namespace kfac
