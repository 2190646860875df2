#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "kfac/parallel.h"

namespace kfac {

// Problems of different sizes, the largest first, so that no thread is left with a large one at the end.
class SizeOrder {
 public:
  template <class Size>
  SizeOrder(int64_t count, Size size) : order_(count) {
    std::iota(order_.begin(), order_.end(), int64_t(0));
    std::stable_sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) { return size(a) > size(b); });
    for (const int64_t i : order_) sizes_.push_back(double(size(i)));
  }

  // body(i) of all, side by side
  template <class Body>
  void run_each(int threads, Body body) const {
    parallel_for(int64_t(order_.size()), threads, [&](int64_t i) { body(order_[i]); });
  }

  // body(i, threads): with all threads for each size from `shared` on, then with one thread each, side by side.
  template <class Body>
  void run(double shared, int threads, Body body) const {
    const int64_t count = static_cast<int64_t>(order_.size());
    int64_t first = 0;
    if (threads > 1) {
      for (; first < count && sizes_[first] >= shared; ++first) body(order_[first], threads);
    }
    parallel_for(count - first, threads, [&](int64_t i) { body(order_[first + i], 1); });
  }

 private:
  std::vector<int64_t> order_;
  std::vector<double> sizes_;
};

}  // namespace kfac
