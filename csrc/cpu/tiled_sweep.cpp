#include "tiled_sweep.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "kfac/checked.h"
#include "kfac/parallel.h"
#include "kfac/simd_linalg.h"

namespace kfac {
namespace {

// Panels swept together: wide enough that a tile is not fetched too often, narrow enough that W stays in cache.
int64_t block_panels(int64_t panels) {
  return panels <= 16 ? panels : 8;
}

constexpr int64_t kRowsTogether = 4;  // tile rows that share each W_j they read

// tile [kPanel][kPanel] += a^T b, a and b panels of `rows` rows
template <class T>
void multiply_add(int64_t rows, const T* a, const T* b, T* tile) {
  panel_kernels<T>().gram({1, 0, rows}, a, b, kPanel, tile);
}

template <class T>
void transpose(const T* tile, T* target) {
  for (int i = 0; i < kPanel; ++i) {
    for (int j = 0; j < kPanel; ++j) target[i * kPanel + j] = tile[j * kPanel + i];
  }
}

// Asks for a tile that will be added to soon: at the end of a long product its fetch would be waited for.
template <class T>
void prefetch(const T* tile) {
  for (int k = 0; k < kTile; k += 64 / int(sizeof(T))) __builtin_prefetch(tile + k, 1, 2);
}

template <class T>
void clear(T* tiles, int64_t count = 1) {
  std::fill_n(tiles, count * kTile, T(0));
}

}  // namespace

template <class T>
TiledSweep<T>::TiledSweep(int64_t pivots, int64_t others)
    : pivots_(pivots),
      panels_(pivots + others),
      block_size_(block_panels(pivots) * kPanel),
      tiles_(elements<T>((Checked(pivots) * (pivots + 1) + Checked(others) * pivots * 2) * (kTile / 2))),
      products_(elements<T>(Checked(panels_) * block_size_ * kPanel)),
      factor_(block_size_ * block_size_),
      inverse_(block_size_ * block_size_),
      inverse_t_(block_size_ * block_size_) {}

template <class T>
int64_t TiledSweep<T>::run(int threads) {
  for (int64_t first = 0; first < pivots_; first += block_size_ / kPanel) {
    const Block block{first, std::min(pivots_, first + block_size_ / kPanel)};
    if (const int64_t column = invert_block_factor(block)) return first * kPanel + column;
    parallel_for(panels_, threads, [&](int64_t i) {
      if (!block.contains(i)) sweep_panel(block, i);
    });
    write_inverse(block);
    const int64_t groups = divide_up(panels_, kRowsTogether);
    parallel_for(groups, threads, [&](int64_t group) {
      const int64_t start = (groups - 1 - group) * kRowsTogether;  // the long rows first
      update_rows(block, start, std::min(panels_, start + kRowsTogether));
    });
  }
  return 0;
}

// L^-1 of M_KK = L L^T, 16 columns at a time; 0, or the first column whose pivot is not positive.
template <class T>
int64_t TiledSweep<T>::invert_block_factor(const Block& block) {
  alignas(64) T sum[kTile], leaf[kTile], leaf_t[kTile];
  for (int64_t k = 0; k < block.panels(); ++k) {
    const T* row = row_panel(factor_, k);  // -L_k^T, [columns so far][kPanel]
    std::memcpy(sum, tile(block.first + k, block.first + k), sizeof sum);
    multiply_add(k * kPanel, row, row, sum);
    if (const int column = linalg_kernels<T>().invert_factor(sum, leaf)) return k * kPanel + column;
    transpose(leaf, leaf_t);
    for (int64_t i = k + 1; i < block.panels(); ++i) {  // -L_ik = (-M_ik + L_i L_k^T) L_kk^-T
      transpose(tile(block.first + i, block.first + k), sum);
      multiply_add(k * kPanel, row, row_panel(factor_, i), sum);
      T* target = row_panel(factor_, i) + k * kTile;
      clear(target);
      multiply_add(kPanel, leaf_t, sum, target);
    }
    for (int64_t j = 0; j < k; ++j) {  // (L^-1)_kj = -L_kk^-1 L_k (L^-1)_j
      clear(sum);
      multiply_add((k - j) * kPanel, row + j * kTile, row_panel(inverse_, j) + j * kTile, sum);
      T* target = row_panel(inverse_, j) + k * kTile;
      clear(target);
      multiply_add(kPanel, leaf_t, sum, target);
      transpose(target, row_panel(inverse_t_, k) + j * kTile);
    }
    std::memcpy(row_panel(inverse_, k) + k * kTile, leaf, sizeof leaf);
    std::memcpy(row_panel(inverse_t_, k) + k * kTile, leaf_t, sizeof leaf);
  }
  return 0;
}

// W_i <- M_iK L^-T, then M_iK <- W_i L^-1
template <class T>
void TiledSweep<T>::sweep_panel(const Block& block, int64_t i) {
  const bool above = i < block.first;  // M_iK is stored as M_Ki^T
  Buffer<T> panel(block.size() * kPanel);
  for (int64_t k = 0; k < block.panels(); ++k) {
    T* target = panel.data() + k * kTile;
    above ? void(std::memcpy(target, tile(block.first + k, i), kTile * sizeof(T)))
          : transpose(tile(i, block.first + k), target);
  }
  T* W = row_panel(products_, i);
  clear(W, block.panels());
  for (int64_t k = 0; k < block.panels(); ++k) {
    multiply_add((k + 1) * kPanel, row_panel(inverse_t_, k), panel.data(), W + k * kTile);
  }
  clear(panel.data(), block.panels());
  for (int64_t k = 0; k < block.panels(); ++k) {
    T* swept = panel.data() + k * kTile;
    multiply_add(block.size() - k * kPanel, row_panel(inverse_, k) + k * kTile, W + k * kTile, swept);
    above ? void(std::memcpy(tile(block.first + k, i), swept, kTile * sizeof(T)))
          : transpose(swept, tile(i, block.first + k));
  }
}

// M_KK^-1 = L^-T L^-1
template <class T>
void TiledSweep<T>::write_inverse(const Block& block) {
  for (int64_t i = 0; i < block.panels(); ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      T* target = tile(block.first + i, block.first + j);
      clear(target);
      multiply_add(block.size() - i * kPanel, row_panel(inverse_, i) + i * kTile, row_panel(inverse_, j) + i * kTile,
                   target);
    }
  }
}

// Tiles (i, j), i in [first, last), j outside the block, += W_i W_j^T
template <class T>
void TiledSweep<T>::update_rows(const Block& block, int64_t first, int64_t last) {
  for (int64_t j = 0; j < std::min(last, pivots_); ++j) {
    if (block.contains(j)) continue;
    for (int64_t i = std::max(first, j); i < last; ++i) {
      if (i + 1 < last) prefetch(tile(i + 1, j));
      if (!block.contains(i)) multiply_add(block.size(), row_panel(products_, i), row_panel(products_, j), tile(i, j));
    }
  }
}

template class TiledSweep<float>;
template class TiledSweep<double>;

}  // namespace kfac
