// Which of the two algorithms serves a shape: a cost model, fitted to what bench/crossover.py has measured.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "kfac/covariance.h"
#include "kfac/simd.h"

namespace kfac {
namespace {

// Tile rows summed for all pairs of panels of `channels` channels, or for half of them.
double tile_rows(int64_t channels, bool half) {
  const int64_t panels = divide_up(channels, int64_t(kPanel));
  double rows = 0;
  for (int64_t i = 0; i < panels; ++i) {
    rows += double(std::min<int64_t>(kPanel, divide_up(channels - i * kPanel, 4) * 4)) * double(half ? i + 1 : panels);
  }
  return rows;
}

double positions_seen(int64_t out, int64_t stride, int64_t kernel, int64_t dilation) {
  return double((out - 1) * stride + (kernel - 1) * dilation + 1);
}

template <size_t N>
double cost(const std::array<double, N>& work, const std::array<double, N>& weights) {
  return std::inner_product(work.begin(), work.end(), weights.begin(), 0.0);
}

}  // namespace

CovarianceWork covariance_work(const ConvShape& shape) {
  const std::shared_ptr<const ShiftPlan> plan = shift_plan(shape);
  const int64_t channels = shape.group_channels(), panels = divide_up(channels, int64_t(kPanel));
  const int64_t patch_panels = divide_up(shape.patch_size(), int64_t(kPanel));
  double products = 0;
  for (const Region& r : plan->regions) products += double(r.ny * r.nx) * tile_rows(channels, r.symmetric());
  const double samples = double(shape.samples);
  const double seen = positions_seen(shape.out_h, shape.stride_h, shape.kernel_h, shape.dilation_h) *
                      positions_seen(shape.out_w, shape.stride_w, shape.kernel_w, shape.dilation_w);
  return {{samples * products, samples * double(shape.height * shape.width * panels * kPanel),
           double(panels * panels) * double(plan->regions.size()),
           double(channels * panels) * (double(plan->terms.size()) + double(shape.taps() * shape.taps()))},
          {samples * double(shape.out_h * shape.out_w) * tile_rows(shape.patch_size(), true),
           samples * seen * double(channels), double(patch_panels * (patch_panels + 1) / 2)}};
}

const CovarianceWork& covariance_weights() {
  static const bool wide = std::strcmp(simd().name, "avx512") == 0;
  return wide ? kWideWeights : kNarrowWeights;
}

CovarianceCosts covariance_costs(const ConvShape& shape) {
  const CovarianceWork work = covariance_work(shape), &weights = covariance_weights();
  return {cost(work.shift, weights.shift), cost(work.patches, weights.patches)};
}

CovarianceAlgorithm covariance_algorithm(const ConvShape& shape) {
  const bool depthwise = shape.groups > 1 && shape.group_channels() == 1;
  if (shape.taps() == 1) return CovarianceAlgorithm::kShift;
  if (!has_small_plan(shape)) return CovarianceAlgorithm::kPatches;
  if (depthwise) return CovarianceAlgorithm::kShift;
  const CovarianceCosts costs = covariance_costs(shape);
  return costs.shift <= costs.patches ? CovarianceAlgorithm::kShift : CovarianceAlgorithm::kPatches;
}

}  // namespace kfac
