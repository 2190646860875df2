// A step of greedy selection; who does what: kfac/greedy_group.h
#pragma once

#include "kfac/greedy_group.h"
#include "saliency.cuh"

namespace kfac {

// Whether a pivot of any layer has failed.
KFAC_DEVICE bool greedy_stopped(const GreedyJob& job) {
  for (int32_t layer = 0; layer < job.layers; ++layer) {
    if (job.failures[3 * layer] >= 0) return true;
  }
  return false;
}

KFAC_DEVICE const float* greedy_row(const GreedyJob& job, int32_t k) {
  return job.H + job.removed[k] * job.H_stride;
}

// Rows of L^T of the columns that went last, and wait, then of those that go now
KFAC_DEVICE const float* greedy_latest_row(const GreedyJob& job, int32_t k) {
  if (k < job.pending_count) return greedy_row(job, job.removed_count - job.pending_count + k);
  return job.H + job.lost[k - job.pending_count] * job.H_stride;
}

template <class Block>
KFAC_DEVICE void greedy_gather(Block& block, const GreedyJob& job) {
  const int32_t first = block.index() * kGreedyThreads + block.thread(), step = block.count() * kGreedyThreads;
  for (int32_t at = first; at < job.removed_count * job.q; at += step) {
    job.factors[at] = -greedy_row(job, at / job.q)[job.lost[at % job.q]];
  }
  for (int32_t at = first; at < job.outputs * job.q; at += step) {
    const int32_t o = at / job.q, i = at % job.q;
    job.P[int64_t(i) * job.outputs + o] = job.V[o * job.V_stride + job.lost[i]];
  }
}

// H_JJ now; a warp an entry of the lower triangle
template <class Block>
KFAC_DEVICE void greedy_pivot_block(Block& block, const GreedyJob& job, double* S) {
  for (int32_t at = block.thread() / 32; at < job.q * (job.q + 1) / 2; at += kGreedyWarps) {
    const TilePair pair = tile_pair(at, job.q, true);
    double sum = 0.0;
    for (int32_t k = block.thread() % 32; k < job.removed_count; k += 32) {
      const float* const row = job.factors + int64_t(k) * job.q;
      sum -= double(row[pair.i]) * double(row[pair.j]);
    }
    sum = warp_sum(block, sum);
    if (block.thread() % 32 == 0) S[at] = job.H[job.lost[pair.i] * job.H_stride + job.lost[pair.j]] + sum;
  }
  block.sync();
}

template <class Block>
KFAC_DEVICE void greedy_pivot(Block& block, const GreedyJob& job) {
  double* const S = reinterpret_cast<double*>(block.shared());
  double* const X = S + kGreedyPairs;
  const auto at = [](int32_t row, int32_t column) { return row * (row + 1) / 2 + column; };
  greedy_pivot_block(block, job, S);
  int32_t failed = -1;
  for (int32_t p = 0; p < job.q && failed < 0; ++p) {  // S = L D L^T, column by column times D
    const double pivot = S[at(p, p)];
    if (!(pivot > 0.0 && pivot - pivot == 0.0)) failed = p;
    const int32_t first = p + 1, rest = job.q - first;
    for (int32_t number = block.thread(); failed < 0 && number < rest * (rest + 1) / 2; number += kGreedyThreads) {
      const TilePair pair = tile_pair(number, rest, true);
      S[at(first + pair.i, first + pair.j)] -= S[at(first + pair.i, p)] * S[at(first + pair.j, p)] / pivot;
    }
    block.sync();
  }
  if (block.thread() == 0) job.failures[3 * job.layer] = failed;
  if (failed >= 0) return;
  // T = L sqrt(D); a thread a column of T^-1
  for (int32_t j = block.thread(); j < job.q; j += kGreedyThreads) {
    for (int32_t i = 0; i < job.q; ++i) {
      double sum = i == j ? 1.0 : 0.0;
      for (int32_t k = j; k < i; ++k) sum -= S[at(i, k)] / sqrt(S[at(k, k)]) * X[at(k, j)];
      if (i >= j) X[at(i, j)] = sum / sqrt(S[at(i, i)]);
      job.pivot[i * job.q + j] = i >= j ? float(X[at(i, j)]) : 0.0f;
    }
  }
}

template <class Block>
KFAC_DEVICE void greedy_weights(Block& block, const GreedyJob& job) {
  if (greedy_stopped(job)) return;
  const float* const factors = job.factors + int64_t(job.removed_count - job.pending_count) * job.q;
  for (int32_t o = block.index() * kGreedyThreads + block.thread(); o < job.outputs;
       o += block.count() * kGreedyThreads) {
    float* const P = job.P + o;
    for (int32_t i = 0; i < job.q; ++i) {
      float sum = P[int64_t(i) * job.outputs];
      for (int32_t k = 0; k < job.pending_count; ++k) {
        sum += job.pending[int64_t(k) * job.outputs + o] * factors[k * job.q + i];
      }
      P[int64_t(i) * job.outputs] = sum;
    }
    for (int32_t i = job.q - 1; i >= 0; --i) {  // from the last on: what comes before is still V_J
      float sum = 0.0f;
      for (int32_t k = 0; k <= i; ++k) sum += job.pivot[i * job.q + k] * P[int64_t(k) * job.outputs];
      P[int64_t(i) * job.outputs] = sum;
    }
  }
}

template <class Block>
KFAC_DEVICE void greedy_products(Block& block, const GreedyJob& job) {
  if (greedy_stopped(job)) return;
  const int32_t lane = block.thread() % 32;
  for (int32_t o = block.index() * kGreedyWarps + block.thread() / 32; o < job.outputs;
       o += block.count() * kGreedyWarps) {
    const float* const G = job.G + o * job.G_stride;
    for (int32_t first = 0; first < job.q; first += kGreedySums) {
      double sums[kGreedySums] = {};
      for (int32_t k = lane; k < job.outputs; k += 32) {
        KFAC_UNROLL
        for (int i = 0; i < kGreedySums; ++i) {
          if (first + i < job.q) sums[i] += double(G[k]) * double(job.P[int64_t(first + i) * job.outputs + k]);
        }
      }
      KFAC_UNROLL
      for (int i = 0; i < kGreedySums; ++i) {
        sums[i] = warp_sum(block, sums[i]);
        if (lane == 0 && first + i < job.q) job.forms[int64_t(o) * job.q + first + i] = float(sums[i]);
      }
    }
  }
}

// For rows of pending: -P_k . (G P)_i; for new rows: -1/2 P_k . (G P)_i
template <class Block>
KFAC_DEVICE void greedy_forms(Block& block, const GreedyJob& job) {
  if (greedy_stopped(job)) return;
  const int32_t lane = block.thread() % 32, entries = (job.pending_count + job.q) * job.q;
  for (int32_t at = block.index() * kGreedyWarps + block.thread() / 32; at < entries;
       at += block.count() * kGreedyWarps) {
    const int32_t k = at / job.q, i = at % job.q, fresh = k - job.pending_count;
    const float* const P = fresh < 0 ? job.pending + int64_t(k) * job.outputs : job.P + int64_t(fresh) * job.outputs;
    double sum = 0.0;
    for (int32_t o = lane; o < job.outputs; o += 32) sum += double(P[o]) * double(job.forms[int64_t(o) * job.q + i]);
    sum = warp_sum(block, sum);
    if (lane == 0) job.forms[int64_t(job.outputs) * job.q + at] = float(fresh < 0 ? -sum : -0.5 * sum);
  }
}

// sums [q][kGreedyColumns] += sum over `count` rows of factors[k][i] row(k)[column]: warps share the rows, lanes the
// columns. scratch: [kGreedyWarps][kGreedySums][kGreedyColumns].
template <class Block, class Row>
KFAC_DEVICE void greedy_add_rows(Block& block, int32_t q, int32_t count, const float* factors, bool inside,
                                 const Row& row, float* scratch, float* sums) {
  const int32_t lane = block.thread() % 32, warp = block.thread() / 32;
  for (int32_t first = 0; first < q; first += kGreedySums) {
    float own[kGreedySums] = {};
    for (int32_t k = warp; k < count; k += kGreedyWarps) {
      const float value = inside ? row(k) : 0.0f;
      KFAC_UNROLL
      for (int i = 0; i < kGreedySums; ++i) {
        if (first + i < q) own[i] += factors[int64_t(k) * q + first + i] * value;
      }
    }
    KFAC_UNROLL
    for (int i = 0; i < kGreedySums; ++i) scratch[(warp * kGreedySums + i) * kGreedyColumns + lane] = own[i];
    block.sync();
    if (first + warp < q) {  // a warp a sum: kGreedyWarps == kGreedySums
      float sum = sums[(first + warp) * kGreedyColumns + lane];
      for (int32_t other = 0; other < kGreedyWarps; ++other) {
        sum += scratch[(other * kGreedySums + warp) * kGreedyColumns + lane];
      }
      sums[(first + warp) * kGreedyColumns + lane] = sum;
    }
    block.sync();
  }
}
static_assert(kGreedyWarps == kGreedySums && kGreedyColumns == 32, "");

template <class Block>
KFAC_DEVICE void greedy_columns(Block& block, const GreedyJob& job) {
  if (greedy_stopped(job)) return;
  float* const now = block.shared();  // rows J of H, later of Y^T
  float* const L = now + kMaxGreedyBlock * kGreedyColumns;
  float* const scratch = L + kMaxGreedyBlock * kGreedyColumns;
  const int32_t lane = block.thread() % 32, warp = block.thread() / 32, outputs = job.outputs;
  for (int32_t tile = block.index(); tile * kGreedyColumns < job.columns; tile += block.count()) {
    const int32_t column = tile * kGreedyColumns + lane;
    const bool inside = column < job.columns;
    for (int32_t i = warp; i < job.q; i += kGreedyWarps) {
      now[i * kGreedyColumns + lane] = inside ? job.H[job.lost[i] * job.H_stride + column] : 0.0f;
    }
    block.sync();
    greedy_add_rows(
        block, job.q, job.removed_count, job.factors, inside, [&](int32_t k) { return greedy_row(job, k)[column]; },
        scratch, now);
    for (int32_t i = warp; i < job.q; i += kGreedyWarps) {
      float sum = 0.0f;
      for (int32_t k = 0; k <= i; ++k) sum += job.pivot[i * job.q + k] * now[k * kGreedyColumns + lane];
      L[i * kGreedyColumns + lane] = sum;
      if (inside) job.H[job.lost[i] * job.H_stride + column] = sum;
    }
    block.sync();
    for (int32_t i = warp; i < job.q; i += kGreedyWarps) now[i * kGreedyColumns + lane] = 0.0f;
    block.sync();
    greedy_add_rows(
        block, job.q, outputs, job.forms, inside, [&](int32_t o) { return job.V[o * job.V_stride + column]; }, scratch,
        now);
    const float* const forms = job.forms + int64_t(outputs) * job.q;
    greedy_add_rows(
        block, job.q, job.pending_count + job.q, forms, inside,
        [&](int32_t k) {
          return k < job.pending_count ? greedy_latest_row(job, k)[column]
                                       : L[(k - job.pending_count) * kGreedyColumns + lane];
        },
        scratch, now);
    for (int32_t i = warp; i < job.q; i += kGreedyWarps) {
      if (inside) job.Y[int64_t(i) * job.columns + column] = now[i * kGreedyColumns + lane];
    }
    block.sync();
  }
  if (block.index() == 0 && block.thread() == 0) {
    const float* const diagonal = job.forms + (int64_t(outputs) + job.pending_count) * job.q;
    double change = 0.0;
    for (int32_t i = 0; i < job.q; ++i) change -= diagonal[i * job.q + i];
    *job.change = change;
  }
}

// Lower triangles of a neuron's block and form, less what the columns that go take with them: a warp's work
template <class Block>
KFAC_DEVICE void greedy_update_neuron(Block& block, const GreedyJob& job, const GreedyList& list, int32_t neuron,
                                      double* F, double* H) {
  const int64_t* const columns = list.columns + int64_t(neuron) * list.block;
  for (int32_t at = block.thread() % 32; at < list.block * (list.block + 1) / 2; at += 32) {
    const TilePair pair = tile_pair(at, list.block, true);
    const int64_t place = (int64_t(neuron) * list.block + pair.i) * list.block + pair.j;
    double form = list.forms[place], entry = list.blocks[place];
    for (int32_t i = 0; i < job.q; ++i) {
      const float* const L = job.H + job.lost[i] * job.H_stride;
      const float* const Y = job.Y + int64_t(i) * job.columns;
      const double left = L[columns[pair.i]], right = L[columns[pair.j]];
      entry -= left * right;
      form -= Y[columns[pair.i]] * right + left * Y[columns[pair.j]];
    }
    list.forms[place] = F[at] = form;
    list.blocks[place] = H[at] = entry;
  }
}

template <class Block>
KFAC_DEVICE void greedy_scores(Block& block, const GreedyJob& job, const GreedyList& list) {
  if (greedy_stopped(job)) return;
  const double infinity = double(bits_float(0x7f800000u));
  const int32_t together = greedy_neurons(list.block), pairs = list.block * (list.block + 1) / 2;
  const int32_t warp = block.thread() / 32;
  double* const F = reinterpret_cast<double*>(block.shared()) + warp * pairs;
  double* const H = F + kGreedyPairs;
  for (int32_t first = block.index() * together; first < list.count; first += block.count() * together) {
    const int32_t neuron = first + warp;
    bool stays = warp < together && neuron < list.count && list.scores[neuron] != infinity;
    for (int32_t i = 0; stays && i < job.q; ++i) stays = list.columns[int64_t(neuron) * list.block] != job.lost[i];
    if (stays) greedy_update_neuron(block, job, list, neuron, F, H);
    block.sync();
    double trace = 0.0;
    bool failed = false;
    for (int32_t pivot = 0; pivot < list.block; ++pivot) {
      if (stays) {
        const int32_t corner = pivot * (pivot + 3) / 2;
        failed = failed || !(H[corner] > 0.0 && H[corner] - H[corner] == 0.0);
        trace += F[corner] / H[corner];
        eliminate(block, list.block, pivot, F, H);
      }
      block.sync();
    }
    if (warp < together && neuron < list.count && block.thread() % 32 == 0) {
      list.scores[neuron] = !stays ? infinity : failed ? -infinity : 0.5 * trace;
    }
    block.sync();
  }
}

template <class Block>
KFAC_DEVICE void greedy_finish(Block& block, const GreedyJob& job) {
  if (greedy_stopped(job)) return;
  const int32_t first = block.index() * kGreedyThreads + block.thread(), step = block.count() * kGreedyThreads;
  const int32_t count = job.pending_count + job.q;
  if (count <= job.pending_capacity) {
    for (int32_t at = first; at < job.q * job.outputs; at += step) {
      job.pending[int64_t(job.pending_count) * job.outputs + at] = job.P[at];
    }
  } else {
    constexpr int kRows = 4;  // of V a thread: the rows of L are read a quarter as often
    const int32_t rows = int32_t(divide_up(job.outputs, kRows));
    for (int64_t at = first; at < int64_t(rows) * job.columns; at += step) {
      const int32_t o = int32_t(at / job.columns) * kRows, column = int32_t(at % job.columns);
      float sums[kRows] = {};
      for (int32_t k = 0; k < count; ++k) {
        const float value = greedy_latest_row(job, k)[column];
        const float* const P = k < job.pending_count ? job.pending + int64_t(k) * job.outputs
                                                     : job.P + int64_t(k - job.pending_count) * job.outputs;
        KFAC_UNROLL
        for (int r = 0; r < kRows; ++r) {
          if (o + r < job.outputs) sums[r] += P[o + r] * value;
        }
      }
      KFAC_UNROLL
      for (int r = 0; r < kRows; ++r) {
        if (o + r < job.outputs) job.V[(o + r) * job.V_stride + column] -= sums[r];
      }
    }
  }
  for (int32_t i = first; i < job.q; i += step) job.removed[job.removed_count + i] = job.lost[i];
}

}  // namespace kfac
