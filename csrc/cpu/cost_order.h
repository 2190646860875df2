#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "kfac/parallel.h"

namespace kfac {

// Problems of different cost, the dearest first, so that no thread is left with a dear one at the end.
class CostOrder {
 public:
  template <class Cost>
  CostOrder(int64_t count, Cost cost) : order_(count) {
    std::iota(order_.begin(), order_.end(), int64_t(0));
    std::stable_sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) { return cost(a) > cost(b); });
    for (const int64_t i : order_) costs_.push_back(double(cost(i)));
  }

  // body(i) of all, side by side
  template <class Body>
  void run_each(int threads, Body body) const {
    parallel_for(count(), threads, [&](int64_t i) { body(order_[i]); });
  }

  // body(i, threads): first, with all threads on one, those dearer than `shared` without which the rest divides better;
  // then the rest with one thread each, side by side.
  template <class Body>
  void run(double shared, int threads, Body body) const {
    int64_t first = 0;
    while (first < count() && costs_[first] >= shared && !divides(first, threads)) body(order_[first++], threads);
    parallel_for(count() - first, threads, [&](int64_t i) { body(order_[first + i], 1); });
  }

 private:
  int64_t count() const { return static_cast<int64_t>(order_.size()); }

  // Whether problems first, first + 1, ... keep that many threads busy to the end, but for a tenth.
  bool divides(int64_t first, int threads) const {
    std::vector<double> loads(threads, 0.0);
    for (int64_t i = first; i < count(); ++i) *std::min_element(loads.begin(), loads.end()) += costs_[i];
    const double longest = *std::max_element(loads.begin(), loads.end());
    return longest * threads <= 1.1 * std::accumulate(loads.begin(), loads.end(), 0.0);
  }

  std::vector<int64_t> order_;
  std::vector<double> costs_;
};

}  // namespace kfac
