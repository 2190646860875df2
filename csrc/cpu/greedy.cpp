#include "kfac/greedy.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "buffer.h"
#include "kfac/checked.h"
#include "kfac/parallel.h"
#include "kfac/simd_greedy.h"
#include "kfac/simd_linalg.h"

namespace kfac {
namespace {

constexpr double kSharedWork = 1e6;    // multiplications from which on it pays to wake other threads
constexpr int64_t kChunkBytes = 2048;  // of a row: the sums of a dozen rows and what is added stay in the first cache

// The columns J of one layer go. Matrices with a row for each of them are [q][...], q = lost_count.
template <class T>
class Removal {
 public:
  explicit Removal(GreedyProblem& problem) : p_(problem), q_(problem.lost_count) {}

  // T^-1, P and G P, all that can fail; writes to nothing but the problem's results.
  void prepare(int threads) {
    p_.change = 0;
    p_.failed_column = p_.failed_list = p_.failed_neuron = -1;
    if (!q_) return;
    gather_factors();
    if (!invert_pivot()) return;
    multiply_weights();
    multiply_G(threads);
  }

  void apply(int threads) {
    if (q_) {
      update_columns(threads);
      update_weights(threads);
      std::copy_n(p_.lost, q_, p_.removed + p_.removed_count);
    }
    score(threads);
  }

 private:
  T* V(int64_t row) const { return static_cast<T*>(p_.weight) + row * p_.weight_stride; }
  T* H(int64_t row) const { return static_cast<T*>(p_.inverse) + row * p_.inverse_stride; }
  const T* G(int64_t row) const { return static_cast<const T*>(p_.G) + row * p_.G_stride; }
  const T* pending(int64_t k) const { return static_cast<const T*>(p_.pending) + k * p_.outputs; }
  int64_t first_pending() const { return p_.removed_count - p_.pending_count; }

  // body(first column, columns) over all n columns of a matrix
  template <class Body>
  static void each_chunk(int64_t n, double work, int threads, Body body) {
    if (work < kSharedWork) threads = 1;
    const int64_t most = kChunkBytes / int64_t(sizeof(T));
    const int64_t rounds = divide_up(n, most * threads);  // in which every thread has one of about equal width
    const int64_t width = divide_up(divide_up(n, rounds * threads), kPanel) * kPanel;
    parallel_for(divide_up(n, width), threads, [&](int64_t i) { body(i * width, std::min(width, n - i * width)); });
  }

  // -L_J of the columns that went before: [removed_count][q]
  void gather_factors() {
    factors_.resize(p_.removed_count * q_);
    for (int64_t k = 0; k < p_.removed_count; ++k) {
      const T* row = H(p_.removed[k]);
      for (int64_t i = 0; i < q_; ++i) factors_[k * q_ + i] = -row[p_.lost[i]];
    }
  }

  // T^-1 of H_JJ = T T^T, in double; whether there is one
  bool invert_pivot() {
    Buffer<double> S(q_ * q_);
    for (int64_t i = 0; i < q_; ++i) {
      for (int64_t j = 0; j < q_; ++j) S[i * q_ + j] = H(p_.lost[i])[p_.lost[j]];
    }
    for (int64_t k = 0; k < p_.removed_count; ++k) {
      const T* row = factors_.data() + k * q_;
      for (int64_t i = 0; i < q_; ++i) {
        for (int64_t j = 0; j <= i; ++j) S[i * q_ + j] -= double(row[i]) * double(row[j]);
      }
    }
    pivot_inverse_.assign(q_ * q_, 0.0);
    for (int64_t i = 0; i < q_; ++i) {  // row i of T, then of T^-1: x_i = (e_i - sum over k < i of T_ik x_k) / T_ii
      double* x = pivot_inverse_.data() + i * q_;
      double square = S[i * q_ + i];
      for (int64_t j = 0; j < i; ++j) {
        double sum = S[i * q_ + j];
        for (int64_t k = 0; k < j; ++k) sum -= S[i * q_ + k] * S[j * q_ + k];
        S[i * q_ + j] = sum / S[j * q_ + j];
        square -= S[i * q_ + j] * S[i * q_ + j];
      }
      if (!(square > 0 && std::isfinite(square))) {
        p_.failed_column = i;
        return false;
      }
      const double root = S[i * q_ + i] = std::sqrt(square);
      for (int64_t k = 0; k < i; ++k) {
        const double* earlier = pivot_inverse_.data() + k * q_;
        for (int64_t j = 0; j <= k; ++j) x[j] -= S[i * q_ + k] * earlier[j];
      }
      for (int64_t j = 0; j < i; ++j) x[j] /= root;
      x[i] = 1 / root;
    }
    return true;
  }

  // P^T = T^-1 V_J^T [q][outputs]
  void multiply_weights() {
    const int64_t outputs = p_.outputs;
    Buffer<T> VJ(q_ * outputs);
    for (int64_t o = 0; o < outputs; ++o) {
      for (int64_t i = 0; i < q_; ++i) VJ[i * outputs + o] = V(o)[p_.lost[i]];
    }
    add_rows(q_, p_.pending_count, outputs, factors_.data() + first_pending() * q_, rows_of_pending(), VJ.data());
    P_.assign(q_ * outputs, T(0));
    add_rows(q_, q_, outputs, pivot_factors().data(), rows_of(VJ, outputs), P_.data());
  }

  // G P, what it is multiplied by to give X^T = (G P)^T V, and 1/2 tr(P^T G P)
  void multiply_G(int threads) {
    const int64_t outputs = p_.outputs, pending_count = p_.pending_count;
    Buffer<T> across(outputs * q_), GP(q_ * outputs, T(0));
    for (int64_t i = 0; i < q_; ++i) {
      for (int64_t o = 0; o < outputs; ++o) across[o * q_ + i] = P_[i * outputs + o];
    }
    each_chunk(outputs, double(q_) * double(outputs) * double(outputs), threads, [&](int64_t c, int64_t columns) {
      std::vector<const T*> rows(outputs);
      for (int64_t o = 0; o < outputs; ++o) rows[o] = G(o) + c;
      greedy_kernels<T>().add_rows(q_, outputs, columns, across.data(), rows.data(), GP.data() + c, outputs);
    });
    // Y^T = X^T - 1/2 (P^T G P) L^T, X^T = (G P)^T (V - pending P L^T): the factors of rows of V, of pending and new L
    form_factors_.resize((outputs + pending_count + q_) * q_);
    T* factors = form_factors_.data();
    for (int64_t o = 0; o < outputs; ++o) {
      for (int64_t i = 0; i < q_; ++i) *factors++ = GP[i * outputs + o];
    }
    for (int64_t k = 0; k < pending_count; ++k) {
      for (int64_t i = 0; i < q_; ++i) *factors++ = T(-dot(pending(k), GP.data() + i * outputs));
    }
    for (int64_t k = 0; k < q_; ++k) {
      for (int64_t i = 0; i < q_; ++i) {
        const double form = dot(P_.data() + k * outputs, GP.data() + i * outputs);
        *factors++ = T(-0.5 * form);
        if (i == k) p_.change += 0.5 * form;
      }
    }
  }

  double dot(const T* a, const T* b) const {
    constexpr int kChains = 8;
    double sums[kChains] = {};
    int64_t o = 0;
    for (; o + kChains <= p_.outputs; o += kChains) {
      for (int k = 0; k < kChains; ++k) sums[k] += double(a[o + k]) * double(b[o + k]);
    }
    for (; o < p_.outputs; ++o) sums[0] += double(a[o]) * double(b[o]);
    return std::accumulate(sums, sums + kChains, 0.0);
  }

  // The new rows of L^T, in place of rows J of H, and Y^T, in one pass over what they are made of.
  void update_columns(int threads) {
    const int64_t n = p_.columns, old = p_.removed_count;
    Y_.assign(q_ * n, T(0));
    const Buffer<T> across = pivot_factors();
    const double work = double(q_) * double(n) * double(old + p_.outputs + p_.pending_count + 2 * q_);
    each_chunk(n, work, threads, [&](int64_t c, int64_t columns) {
      Buffer<T> now(q_ * columns), L(q_ * columns, T(0));  // rows J of H now, then of L^T
      for (int64_t i = 0; i < q_; ++i) std::copy_n(H(p_.lost[i]) + c, columns, now.data() + i * columns);
      std::vector<const T*> rows;
      for (int64_t k = 0; k < old; ++k) rows.push_back(H(p_.removed[k]) + c);
      add_rows(q_, old, columns, factors_.data(), rows, now.data());
      add_rows(q_, q_, columns, across.data(), rows_of(now, columns), L.data());
      for (int64_t i = 0; i < q_; ++i) std::copy_n(L.data() + i * columns, columns, H(p_.lost[i]) + c);
      const std::vector<const T*> latest(rows.begin() + first_pending(), rows.end());
      rows.clear();
      for (int64_t o = 0; o < p_.outputs; ++o) rows.push_back(V(o) + c);
      rows.insert(rows.end(), latest.begin(), latest.end());
      for (int64_t i = 0; i < q_; ++i) rows.push_back(L.data() + i * columns);
      greedy_kernels<T>().add_rows(q_, int64_t(rows.size()), columns, form_factors_.data(), rows.data(), Y_.data() + c,
                                   n);
    });
  }

  // P joins what is pending, or all of it is subtracted from V if it is too much.
  void update_weights(int threads) {
    const int64_t outputs = p_.outputs, count = p_.pending_count + q_;
    if (count <= p_.pending_capacity) {
      std::copy(P_.begin(), P_.end(), static_cast<T*>(p_.pending) + p_.pending_count * outputs);
      p_.pending_count = count;
      return;
    }
    Buffer<T> negative(count * outputs);
    std::transform(pending(0), pending(p_.pending_count), negative.begin(), [](T value) { return -value; });
    std::transform(P_.begin(), P_.end(), negative.begin() + p_.pending_count * outputs, [](T value) { return -value; });
    each_chunk(p_.columns, double(count) * double(outputs) * double(p_.columns), threads,
               [&](int64_t c, int64_t columns) {
                 std::vector<const T*> rows;
                 for (int64_t k = first_pending(); k < p_.removed_count; ++k) rows.push_back(H(p_.removed[k]) + c);
                 for (int64_t i = 0; i < q_; ++i) rows.push_back(H(p_.lost[i]) + c);
                 greedy_kernels<T>().add_rows(outputs, count, columns, negative.data(), rows.data(), V(0) + c,
                                              p_.weight_stride);
               });
    p_.pending_count = 0;
  }

  void score(int threads) {
    std::vector<char> went(p_.columns, 0);
    for (int64_t k = 0; k < p_.removed_count + q_; ++k) went[p_.removed[k]] = 1;
    std::vector<Tile> tiles;
    double work = 0;
    for (int64_t list = 0; list < p_.lists; ++list) {
      const GreedyNeurons& neurons = p_.neurons[list];
      Tile tile;
      tile.list = list;
      for (int64_t neuron = 0; neuron < neurons.count; ++neuron) {
        if (went[neurons.columns[neuron * neurons.block]]) {
          neurons.scores[neuron] = std::numeric_limits<double>::infinity();
          continue;
        }
        tile.neurons[tile.lanes++] = neuron;
        work += double(neurons.block * neurons.block) * double(q_ + neurons.block);
        if (tile.lanes < kPanel) continue;
        tiles.push_back(tile);
        tile.lanes = 0;
      }
      if (tile.lanes) tiles.push_back(tile);
    }
    parallel_for(int64_t(tiles.size()), work < kSharedWork ? 1 : threads, [&](int64_t t) { score_tile(tiles[t]); });
    for (const Tile& tile : tiles) {
      if (tile.failed < 0 || p_.failed_neuron >= 0) continue;
      p_.failed_list = tile.list;
      p_.failed_neuron = tile.failed;
    }
  }

  // Up to 16 neurons that stay, and the first of them whose block is not positive definite, or -1.
  struct Tile {
    int64_t list = 0, lanes = 0, failed = -1;
    int64_t neurons[kPanel] = {};
  };

  // Updates and scores them.
  void score_tile(Tile& tile) const {
    const GreedyNeurons& neurons = p_.neurons[tile.list];
    const int64_t size = neurons.block, pairs = size * (size + 1) / 2;
    Buffer<double> blocks(pairs * kPanel, 0.0), forms(pairs * kPanel, 0.0);
    move_triangles<true>(neurons, tile, blocks.data(), forms.data());
    if (q_) {
      Buffer<double> x(q_ * size * kPanel, 0.0), y(q_ * size * kPanel, 0.0);
      for (int64_t i = 0; i < q_; ++i) {
        const T* L = H(p_.lost[i]);
        const T* Y = Y_.data() + i * p_.columns;
        for (int64_t lane = 0; lane < tile.lanes; ++lane) {
          const int64_t* columns = neurons.columns + tile.neurons[lane] * size;
          for (int64_t a = 0; a < size; ++a) {
            x[(i * size + a) * kPanel + lane] = L[columns[a]];
            y[(i * size + a) * kPanel + lane] = Y[columns[a]];
          }
        }
      }
      greedy_simd().lane_updates(int(size), q_, x.data(), y.data(), blocks.data(), forms.data());
      move_triangles<false>(neurons, tile, blocks.data(), forms.data());
    }
    double traces[kPanel], pivots[kPanel];
    linalg_simd().lane_traces(int(size), forms.data(), blocks.data(), traces, pivots);
    for (int64_t lane = 0; lane < tile.lanes; ++lane) {
      neurons.scores[tile.neurons[lane]] = 0.5 * traces[lane];
      if (!(pivots[lane] > 0) && tile.failed < 0) tile.failed = tile.neurons[lane];
    }
  }

  // Lower triangles of a tile's neurons, into lanes (the identity in those that are left over) or out of them
  template <bool kIn>
  static void move_triangles(const GreedyNeurons& neurons, const Tile& tile, double* blocks, double* forms) {
    const int64_t size = neurons.block;
    for (int lane = 0; lane < kPanel; ++lane) {
      for (int64_t a = 0, at = lane; a < size; ++a) {
        for (int64_t b = 0; b <= a; ++b, at += kPanel) {
          if (lane >= tile.lanes) {
            if (kIn) blocks[at] = a == b;
            continue;
          }
          const int64_t place = (tile.neurons[lane] * size + a) * size + b;
          if (kIn) {
            blocks[at] = neurons.blocks[place];
            forms[at] = neurons.forms[place];
          } else {
            neurons.blocks[place] = blocks[at];
            neurons.forms[place] = forms[at];
          }
        }
      }
    }
  }

  // T^-T: row k has what each row of T^-1 multiplies row k of a matrix by
  Buffer<T> pivot_factors() const {
    Buffer<T> across(q_ * q_);
    for (int64_t k = 0; k < q_; ++k) {
      for (int64_t i = 0; i < q_; ++i) across[k * q_ + i] = T(pivot_inverse_[i * q_ + k]);
    }
    return across;
  }

  std::vector<const T*> rows_of(const Buffer<T>& matrix, int64_t columns) const {
    std::vector<const T*> rows(q_);
    for (int64_t i = 0; i < q_; ++i) rows[i] = matrix.data() + i * columns;
    return rows;
  }

  std::vector<const T*> rows_of_pending() const {
    std::vector<const T*> rows(p_.pending_count);
    for (int64_t k = 0; k < p_.pending_count; ++k) rows[k] = pending(k);
    return rows;
  }

  static void add_rows(int64_t outs, int64_t count, int64_t columns, const T* factors,
                       const std::vector<const T*>& rows, T* out) {
    greedy_kernels<T>().add_rows(outs, count, columns, factors, rows.data(), out, columns);
  }

  GreedyProblem& p_;
  const int64_t q_;
  Buffer<T> factors_, P_, form_factors_, Y_;
  Buffer<double> pivot_inverse_;  // T^-1
};

// `index` [count] are columns that have not been taken; takes them.
void take_columns(const char* name, const int64_t* index, int64_t count, std::vector<char>& taken) {
  for (int64_t i = 0; i < count; ++i) {
    check_range(name, index[i], 0, int64_t(taken.size()) - 1);
    if (taken[index[i]]++) throw std::invalid_argument(std::string(name) + " has a column twice");
  }
}

void check(const GreedyProblem& p) {
  check_matrix("weights", p.outputs, p.columns, p.weight_stride);
  check_matrix("inverses", p.columns, p.columns, p.inverse_stride);
  check_matrix("Gs", p.outputs, p.outputs, p.G_stride);
  check_range("counts, of columns that went,", p.removed_count, 0, p.columns);
  check_range("counts, of columns that are pending,", p.pending_count, 0,
              std::min(p.removed_count, p.pending_capacity));
  check_range("lost", p.lost_count, 0, p.columns - p.removed_count);
  std::vector<char> taken(p.columns, 0);
  take_columns("removed", p.removed, p.removed_count, taken);
  take_columns("lost", p.lost, p.lost_count, taken);
  for (const GreedyNeurons* list = p.neurons; list != p.neurons + p.lists; ++list) {
    check_range("neurons of columns", list->count, 1, p.columns);
    check_range("block of columns", list->block, 1, p.columns);
    for (int64_t i = 0; i < list->count * list->block; ++i) check_range("columns", list->columns[i], 0, p.columns - 1);
  }
}

template <class T>
void greedy_remove(GreedyProblem* problems, int64_t count, int threads) {
  std::for_each(problems, problems + count, check);
  std::vector<Removal<T>> removals;
  for (int64_t i = 0; i < count; ++i) removals.emplace_back(problems[i]);
  for (Removal<T>& removal : removals) removal.prepare(threads);
  if (std::any_of(problems, problems + count, [](const GreedyProblem& p) { return p.failed_column >= 0; })) return;
  const Uninterrupted whole;
  for (Removal<T>& removal : removals) removal.apply(threads);
}

}  // namespace

void greedy_remove_cpu(GreedyProblem* problems, int64_t count, DType dtype, int threads) {
  const auto run = dtype == DType::kFloat64 ? greedy_remove<double> : greedy_remove<float>;
  run(problems, count, threads);
}

}  // namespace kfac
