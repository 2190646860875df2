#include "kfac/inverse_group.h"

#include <algorithm>
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
  std::vector<InverseJob> small;
  for (const int32_t place : order) {
    if (shapes[place].n > kInverseEdge) {
      throw std::invalid_argument("damped_inverse: a matrix of size " + std::to_string(shapes[place].n) +
                                  ", expected at most " + std::to_string(kInverseEdge));
    }
    small.push_back({shapes[place].stride, int32_t(shapes[place].n), place});
  }
  small_count_ = int32_t(small.size());
  append(descriptors_, small);
}

InverseSchedule InverseGroup::schedule(const void* descriptors) const {
  return {static_cast<const InverseJob*>(descriptors), small_count_};
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
