#include "kfac/saliency.h"

#include <algorithm>
#include <vector>

#include "buffer.h"
#include "cost_order.h"
#include "kfac/checked.h"
#include "kfac/parallel.h"
#include "kfac/simd_linalg.h"

namespace kfac {
namespace {

constexpr int64_t kWantedPanels = 8;  // panels of V that share each panel of G they read

// One layer. A lane is a neuron: panel c of 16 neurons holds column c of each one's block, [outputs][kPanel], so that
// no vector is half empty whatever the block size, and the blocks are worked on 16 at a time.
template <class T>
class LayerScores {
 public:
  LayerScores(SaliencyProblem& problem, Saliency kind)
      : p_(problem),
        kind_(kind),
        size_(problem.block),
        pairs_(size_ * (size_ + 1) / 2),
        neurons_(problem.columns / size_),
        G_panels_(divide_up(problem.outputs, kPanel)),
        groups_together_(std::max<int64_t>(1, kWantedPanels / size_)) {}

  int64_t tasks() const { return divide_up(neurons_, groups_together_ * kPanel); }
  double task_cost() const { return double(p_.outputs) * double(p_.outputs) * double(size_ * groups_together_); }

  // G in panels of columns; G is symmetric.
  void pack_G() {
    G_.assign(elements<T>(Checked(G_panels_) * panel_size()), T(0));
    for (int64_t i = 0; i < G_panels_; ++i) {
      const int64_t columns = std::min<int64_t>(kPanel, p_.outputs - i * kPanel);
      for (int64_t r = 0; r < p_.outputs; ++r) {
        std::copy_n(static_cast<const T*>(p_.G) + r * p_.G_stride + i * kPanel, columns,
                    G_.data() + i * panel_size() + r * kPanel);
      }
    }
    failed_.assign(tasks(), -1);
  }

  void run_task(int64_t task) {
    const int64_t first = task * groups_together_ * kPanel;
    const int64_t groups = std::min(groups_together_, divide_up(neurons_ - first, kPanel));
    const Checked columns = Checked(groups) * size_;
    Buffer<T> V(elements<T>(columns * panel_size()), T(0)), GV(elements<T>(columns * (G_panels_ * kTile)), T(0));
    for (int64_t g = 0; g < groups; ++g) pack_V(first + g * kPanel, V.data() + g * size_ * panel_size());
    multiply_G(groups * size_, V.data(), GV.data());
    for (int64_t g = 0; g < groups; ++g) {
      score(task, first + g * kPanel, V.data() + g * size_ * panel_size(), GV.data() + g * size_ * G_panels_ * kTile);
    }
  }

  void report_failure() {
    p_.failed = -1;
    for (const int64_t neuron : failed_) {
      if (p_.failed < 0) p_.failed = neuron;
    }
  }

 private:
  int64_t panel_size() const { return p_.outputs * kPanel; }
  int64_t lanes(int64_t first) const { return std::min<int64_t>(kPanel, neurons_ - first); }

  void pack_V(int64_t first, T* V) const {
    for (int64_t r = 0; r < p_.outputs; ++r) {
      const T* from = static_cast<const T*>(p_.weight) + r * p_.weight_stride + first * size_;
      for (int64_t lane = 0; lane < lanes(first); ++lane) {
        for (int64_t c = 0; c < size_; ++c) V[c * panel_size() + r * kPanel + lane] = *from++;
      }
    }
  }

  void multiply_G(int64_t panels, const T* V, T* GV) const {
    for (int64_t i = 0; i < G_panels_; ++i) {
      check_interrupt();
      for (int64_t c = 0; c < panels; ++c) {
        panel_kernels<T>().gram({1, 0, p_.outputs}, G_.data() + i * panel_size(), V + c * panel_size(), kPanel,
                                GV + (c * G_panels_ + i) * kTile);
      }
    }
  }

  void score(int64_t task, int64_t first, const T* V, const T* GV) {
    Buffer<double> forms(elements<double>(Checked(pairs_) * kPanel)), blocks(forms.size(), 0.0);
    for (int64_t c = 0; c < size_; ++c) {  // row c of V_J^T G V_J
      linalg_kernels<T>().lane_dots(c + 1, p_.outputs, GV + c * G_panels_ * kTile, V, panel_size(),
                                    forms.data() + c * (c + 1) / 2 * kPanel);
    }
    pack_blocks(first, blocks.data());
    double traces[kPanel] = {};
    if (kind_ == Saliency::kObs) {
      double pivots[kPanel];
      linalg_simd().lane_traces(int(size_), forms.data(), blocks.data(), traces, pivots);
      for (int64_t lane = lanes(first) - 1; lane >= 0; --lane) {
        if (!(pivots[lane] > 0) && (failed_[task] < 0 || first + lane < failed_[task])) failed_[task] = first + lane;
      }
    } else {
      trace_products(forms.data(), blocks.data(), traces);
    }
    for (int64_t lane = 0; lane < lanes(first); ++lane) {
      static_cast<T*>(p_.scores)[first + lane] = T(0.5 * traces[lane]);
    }
  }

  // Lower triangles of the diagonal blocks of A or H; the identity where there is no neuron.
  void pack_blocks(int64_t first, double* blocks) const {
    for (int64_t c = 0; c < size_; ++c) {
      std::fill_n(blocks + (c * (c + 3) / 2) * kPanel, kPanel, 1.0);
      for (int64_t lane = 0; lane < lanes(first); ++lane) {
        const int64_t start = (first + lane) * size_;
        const T* row = static_cast<const T*>(p_.input) + (start + c) * p_.input_stride + start;
        for (int64_t k = 0; k <= c; ++k) blocks[(c * (c + 1) / 2 + k) * kPanel + lane] = row[k];
      }
    }
  }

  // traces += tr(F B) of symmetric F, B
  void trace_products(const double* F, const double* B, double* traces) const {
    for (int64_t c = 0; c < size_; ++c) {
      for (int64_t k = 0; k <= c; ++k, F += kPanel, B += kPanel) {
        const double times = k < c ? 2 : 1;
        for (int lane = 0; lane < kPanel; ++lane) traces[lane] += times * F[lane] * B[lane];
      }
    }
  }

  SaliencyProblem& p_;
  const Saliency kind_;
  const int64_t size_, pairs_, neurons_, G_panels_, groups_together_;
  Buffer<T> G_;
  std::vector<int64_t> failed_;  // of every task
};

template <class T>
void saliency(SaliencyProblem* problems, int64_t count, Saliency kind, int threads) {
  std::vector<LayerScores<T>> layers;
  struct Task {
    int64_t layer, number;
  };
  std::vector<Task> tasks;
  for (int64_t i = 0; i < count; ++i) {
    layers.emplace_back(problems[i], kind);
    for (int64_t t = 0; t < layers.back().tasks(); ++t) tasks.push_back({i, t});
  }
  parallel_for(count, threads, [&](int64_t i) { layers[i].pack_G(); });
  const CostOrder order(int64_t(tasks.size()), [&](int64_t t) { return layers[tasks[t].layer].task_cost(); });
  order.run_each(threads, [&](int64_t t) { layers[tasks[t].layer].run_task(tasks[t].number); });
  for (LayerScores<T>& layer : layers) layer.report_failure();
}

void check(const SaliencyProblem& p) {
  check_matrix("a weight", p.outputs, p.columns, p.weight_stride);
  check_matrix("A or H", p.columns, p.columns, p.input_stride);
  check_matrix("G", p.outputs, p.outputs, p.G_stride);
  check_range("a block", p.block, 1, p.columns);
}

}  // namespace

void saliency_cpu(SaliencyProblem* problems, int64_t count, Saliency kind, DType dtype, int threads) {
  std::for_each(problems, problems + count, check);
  const auto run = dtype == DType::kFloat64 ? saliency<double> : saliency<float>;
  run(problems, count, kind, threads);
}

}  // namespace kfac
