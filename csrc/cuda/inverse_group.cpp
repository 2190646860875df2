#include "kfac/inverse_group.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

#include "descriptors.h"

namespace kfac {

InverseGroup::InverseGroup(const std::vector<InverseShape>& shapes) : matrices_(int64_t(shapes.size())) {
  if (shapes.size() > kMaxInverseMatrices) {
    throw std::invalid_argument("damped_inverse: " + std::to_string(shapes.size()) + " matrices, expected at most " +
                                std::to_string(kMaxInverseMatrices));
  }
  std::vector<int32_t> order(shapes.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return shapes[a].n > shapes[b].n; });
  std::vector<InverseJob> small, large;
  for (const int32_t place : order) {
    const InverseShape& shape = shapes[place];
    if (shape.n < 1 || shape.n >= kMaxInverseSize) {
      throw std::invalid_argument("damped_inverse: a matrix of size " + std::to_string(shape.n) + ", expected 1 to " +
                                  std::to_string(kMaxInverseSize - 1));
    }
    InverseJob job{shape.stride, int32_t(shape.n), place, int32_t(divide_up(shape.n, kInverseEdge)), 0};
    if (job.tiles == 1) {
      small.push_back(job);
    } else {
      job.panels = workspace_floats_;
      workspace_floats_ += inverse_panel_floats(job.tiles);
      large.push_back(job);
    }
  }
  small_count_ = int32_t(small.size());
  append(descriptors_, small);
  large_offset_ = append(descriptors_, large);
  for (int32_t level = 0; !large.empty() && level < large.front().tiles; ++level) {
    const auto has_level = [&](const InverseJob& job) { return job.tiles > level; };
    active_.push_back(int32_t(std::count_if(large.begin(), large.end(), has_level)));
  }
  for (int step = 0; step < kInverseSteps; ++step) {
    first_[step].push_back(0);
    for (const InverseJob& job : large) {
      const int64_t end = int64_t(first_[step].back()) + inverse_step_tiles(InverseStep(step), job.tiles);
      if (end > std::numeric_limits<int32_t>::max()) throw std::invalid_argument("damped_inverse: 2^31 tiles and more");
      first_[step].push_back(int32_t(end));
    }
    first_offset_[step] = append(descriptors_, first_[step]);
  }
}

InverseSchedule InverseGroup::schedule(const void* descriptors) const {
  return {static_cast<const InverseJob*>(descriptors), small_count_};
}

JobList<InverseJob> InverseGroup::large(const void* descriptors, InverseStep step, int32_t level) const {
  const char* const base = static_cast<const char*>(descriptors);
  const int at = static_cast<int>(step);
  const int32_t count = active(level);
  return {reinterpret_cast<const InverseJob*>(base + large_offset_),
          reinterpret_cast<const int32_t*>(base + first_offset_[at]), count, first_[at][count]};
}

InverseCounts InverseGroup::counts() const {
  constexpr double kTile = double(kInverseEdge) * kInverseEdge * kInverseEdge;
  InverseCounts counts;
  for (int32_t level = 0; level < levels(); ++level) {
    const auto tiles = [&](InverseStep step) { return first_[static_cast<int>(step)][active_[level]]; };
    counts.products += kTile * (2.0 * tiles(InverseStep::kPanel) + tiles(InverseStep::kUpdate));
  }
  counts.launches = (small_count_ > 0) + (levels() > 0 ? 3 + 2 * int64_t(levels()) : 0);
  counts.pivots = int64_t(kInverseEdge) * (levels() + (small_count_ > 0));
  return counts;
}

PiPairs pi_pairs(const std::vector<std::array<int64_t, 8>>& pairs) {
  if (pairs.size() > kMaxPiPairs) {
    throw std::invalid_argument("pi_damping: " + std::to_string(pairs.size()) + " pairs, expected at most " +
                                std::to_string(kMaxPiPairs));
  }
  PiPairs list{};
  for (const auto& pair : pairs) {
    for (int which = 0; which < 2; ++which) {
      const int64_t* const spec = pair.data() + 4 * which;
      list.matrix[list.count][which] = reinterpret_cast<const float*>(spec[0]);
      list.stride[list.count][which] = spec[1];
      list.n[list.count][which] = int32_t(spec[2]);
      list.place[list.count][which] = int32_t(spec[3]);
    }
    ++list.count;
  }
  return list;
}

}  // namespace kfac
