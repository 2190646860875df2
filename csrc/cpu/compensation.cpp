#include <algorithm>

#include "cost_order.h"
#include "kfac/checked.h"
#include "kfac/parallel.h"
#include "kfac/saliency.h"
#include "tiled_sweep.h"

namespace kfac {
namespace {

constexpr double kSharedCost = 1e8;  // multiplications from which on all threads may work on one layer

double cost(const CompensationProblem& p) {
  const double removed = double(p.removed), outputs = double(p.outputs);
  return removed * (removed * removed / 2 + outputs * (removed + double(p.remaining)));
}

// One layer: the sweep of [[H_JJ, .], [W_J, .]] leaves U = W_J (H_JJ)^-1 below, then out = W_K - U H_JK.
template <class T>
class Compensation {
 public:
  explicit Compensation(CompensationProblem& problem)
      : p_(problem),
        pruned_panels_(divide_up(problem.removed, kPanel)),
        output_panels_(divide_up(problem.outputs, kPanel)),
        sweep_(pruned_panels_, output_panels_) {}

  void run(int threads) {
    U_.resize(elements<T>(Checked(output_panels_) * panel_size()));
    parallel_for(pruned_panels_ + output_panels_, threads, [&](int64_t i) { fill_row(i); });
    p_.info = sweep_.run(threads);
    if (p_.info) return;
    parallel_for(output_panels_, threads, [&](int64_t i) { transpose_row(i); });
    parallel_for(divide_up(p_.remaining, kPanel), threads, [&](int64_t k) { write_columns(k); });
  }

 private:
  int64_t panel_size() const { return pruned_panels_ * kTile; }

  T weight(int64_t row, int64_t column) const {
    return static_cast<const T*>(p_.weight)[row * p_.weight_stride + column];
  }
  T inverse(int64_t row, int64_t column) const {
    return static_cast<const T*>(p_.inverse)[row * p_.inverse_stride + column];
  }

  // The negative of H_JJ (the identity beyond it) or of W_J
  void fill_row(int64_t i) {
    for (int64_t j = 0; j < std::min(i + 1, pruned_panels_); ++j) {
      T* tile = sweep_.tile(i, j);
      for (int64_t r = 0; r < kPanel; ++r) {
        for (int64_t c = 0; c < kPanel; ++c) tile[r * kPanel + c] = -entry(i * kPanel + r, j * kPanel + c);
      }
    }
  }

  T entry(int64_t row, int64_t column) const {
    const int64_t output = row - pruned_panels_ * kPanel;
    if (output >= 0) return output < p_.outputs && column < p_.removed ? weight(output, p_.pruned[column]) : T(0);
    if (row >= p_.removed || column >= p_.removed) return T(row == column);
    return inverse(p_.pruned[std::max(row, column)], p_.pruned[std::min(row, column)]);
  }

  // -U^T in panels [removed][kPanel]
  void transpose_row(int64_t i) {
    for (int64_t j = 0; j < pruned_panels_; ++j) {
      const T* tile = sweep_.tile(pruned_panels_ + i, j);
      T* target = U_.data() + i * panel_size() + j * kTile;
      for (int64_t r = 0; r < kPanel; ++r) {
        for (int64_t c = 0; c < kPanel; ++c) target[r * kPanel + c] = tile[c * kPanel + r];
      }
    }
  }

  // 16 of the columns that stay
  void write_columns(int64_t k) {
    const int64_t* kept = p_.kept + k * kPanel;
    const int64_t columns = std::min<int64_t>(kPanel, p_.remaining - k * kPanel);
    Buffer<T> H(panel_size(), T(0));
    for (int64_t j = 0; j < p_.removed; ++j) {
      for (int64_t c = 0; c < columns; ++c) H[j * kPanel + c] = inverse(p_.pruned[j], kept[c]);
    }
    for (int64_t i = 0; i < output_panels_; ++i) {
      T tile[kTile] = {};
      panel_kernels<T>().gram({1, 0, pruned_panels_ * kPanel}, U_.data() + i * panel_size(), H.data(), kPanel, tile);
      for (int64_t r = 0; r < std::min<int64_t>(kPanel, p_.outputs - i * kPanel); ++r) {
        T* row = static_cast<T*>(p_.out) + (i * kPanel + r) * p_.remaining + k * kPanel;
        for (int64_t c = 0; c < columns; ++c) row[c] = weight(i * kPanel + r, kept[c]) + tile[r * kPanel + c];
      }
    }
  }

  CompensationProblem& p_;
  const int64_t pruned_panels_, output_panels_;
  TiledSweep<T> sweep_;
  Buffer<T> U_;
};

}  // namespace

void compensate_cpu(CompensationProblem* problems, int64_t count, DType dtype, int threads) {
  for (int64_t i = 0; i < count; ++i) {
    const CompensationProblem& p = problems[i];
    check_range("columns that go", p.removed, 0, kMaxRows);
    check_range("columns that stay", p.remaining, 0, kMaxRows);
    check_matrix("a weight", p.outputs, p.removed + p.remaining, p.weight_stride);
    check_matrix("H", p.removed + p.remaining, p.removed + p.remaining, p.inverse_stride);
  }
  const CostOrder order(count, [&](int64_t i) { return cost(problems[i]); });
  order.run(kSharedCost, threads, [&](int64_t i, int own) {
    dtype == DType::kFloat64 ? Compensation<double>(problems[i]).run(own) : Compensation<float>(problems[i]).run(own);
  });
}

}  // namespace kfac
