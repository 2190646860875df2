#include "kfac/inverse.h"

#include <algorithm>
#include <limits>

#include "cost_order.h"
#include "kfac/checked.h"
#include "kfac/parallel.h"
#include "tiled_sweep.h"

namespace kfac {
namespace {

constexpr double kSharedSize = 512;  // from here on all threads may work on one matrix

double cube(double n) {
  return n * n * n;
}

template <class T>
class DampedInverse {
 public:
  explicit DampedInverse(InverseProblem& problem)
      : problem_(problem), panels_(divide_up(problem.n, kPanel)), sweep_(panels_, 0) {}

  void run(int threads) {
    parallel_for(panels_, threads, [&](int64_t i) { fill_row(i); });
    problem_.info = static_cast<int>(sweep_.run(threads));
    if (problem_.info) {
      std::fill_n(static_cast<T*>(problem_.inverse), problem_.n * problem_.n, std::numeric_limits<T>::quiet_NaN());
    } else {
      parallel_for(panels_, threads, [&](int64_t i) { write_row(i); });
    }
  }

 private:
  int64_t size_of(int64_t panel) const { return std::min<int64_t>(kPanel, problem_.n - panel * kPanel); }

  // Tiles (i, 0..i) <- -(M + D); the identity beyond the matrix
  void fill_row(int64_t i) {
    for (int64_t j = 0; j <= i; ++j) {
      T* tile = sweep_.tile(i, j);
      if (size_of(i) < kPanel) std::fill_n(tile, kTile, T(0));
      for (int64_t r = 0; r < size_of(i); ++r) {
        const T* row = static_cast<const T*>(problem_.matrix) + (i * kPanel + r) * problem_.stride + j * kPanel;
        for (int64_t c = 0; c < (j < i ? kPanel : r + 1); ++c) tile[r * kPanel + c] = -row[c];
      }
    }
    damp(i);
  }

  void damp(int64_t i) {
    T* tile = sweep_.tile(i, i);
    const T* diagonal = static_cast<const T*>(problem_.diagonal);
    for (int64_t r = 0; r < kPanel; ++r) {
      for (int64_t c = 0; c < r; ++c) tile[c * kPanel + r] = tile[r * kPanel + c];
      if (r >= size_of(i)) {
        tile[r * kPanel + r] = -1;
      } else {
        tile[r * kPanel + r] -= T(problem_.damping) + (diagonal ? diagonal[i * kPanel + r] : T(0));
      }
    }
  }

  // Row panel i of the inverse, all columns: tiles (i, j), and (j, i)^T beyond the diagonal
  void write_row(int64_t i) {
    for (int64_t j = 0; j < panels_; ++j) {
      const T* tile = j <= i ? sweep_.tile(i, j) : sweep_.tile(j, i);
      const int64_t row_step = j <= i ? kPanel : 1, column_step = j <= i ? 1 : kPanel;
      for (int64_t r = 0; r < size_of(i); ++r) {
        T* row = static_cast<T*>(problem_.inverse) + (i * kPanel + r) * problem_.n + j * kPanel;
        for (int64_t c = 0; c < size_of(j); ++c) row[c] = tile[r * row_step + c * column_step];
      }
    }
  }

  InverseProblem& problem_;
  const int64_t panels_;
  TiledSweep<T> sweep_;
};

template <class T>
void damped_inverse(InverseProblem* problems, int64_t count, int threads) {
  const CostOrder order(count, [&](int64_t i) { return cube(double(problems[i].n)); });
  order.run(cube(kSharedSize), threads, [&](int64_t i, int own) { DampedInverse<T>(problems[i]).run(own); });
}

}  // namespace

void damped_inverse_cpu(InverseProblem* problems, int64_t count, DType dtype, int threads) {
  for (int64_t i = 0; i < count; ++i) check_matrix("a matrix", problems[i].n, problems[i].n, problems[i].stride);
  const auto run = dtype == DType::kFloat64 ? damped_inverse<double> : damped_inverse<float>;
  run(problems, count, threads);
}

}  // namespace kfac
