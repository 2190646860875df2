// Symmetric positive definite matrices in place: M -> M^-1, and B M^-1 for rows B below it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "buffer.h"
#include "kfac/simd.h"

namespace kfac {

// The lower triangle of [[M, B^T], [B, .]] in tiles [kPanel][kPanel], M of `pivots` and B of `others` tile rows.
//
// A sweep of the pivot block K, with M_KK = L L^T and W = M_:K L^-T, is
//   M_KK <- -M_KK^-1,   M_:K <- W L^-1 = M_:K M_KK^-1,   all the rest -= W W^T,
// one rank-|K| update of everything; after all blocks M has become -M^-1 and B has become B M^-1 (Beaton 1964;
// Bientinesi, Gunter & van de Geijn 2008 count n^3 operations, as for Cholesky and inverse of the factor). The Schur
// complements that come by are those of a Cholesky factorisation, so are the pivots. The tiles hold the negative of all
// this, so that every product is a sum: fill them with -M and -B, read M^-1 and -B M^-1.
template <class T>
class TiledSweep {
 public:
  TiledSweep(int64_t pivots, int64_t others);

  // Tile (i, j), j <= i and j < pivots; those on the diagonal are full.
  T* tile(int64_t i, int64_t j) {
    const int64_t number =
        i < pivots_ ? i * (i + 1) / 2 + j : pivots_ * (pivots_ + 1) / 2 + (i - pivots_) * pivots_ + j;
    return tiles_.data() + number * kTile;
  }

  // Sweeps all blocks. Returns 0, or k if the leading minor of order k of M is not positive definite.
  int64_t run(int threads);

 private:
  // Panels [first, last) are swept together.
  struct Block {
    int64_t first, last;
    int64_t panels() const { return last - first; }
    int64_t size() const { return panels() * kPanel; }
    bool contains(int64_t panel) const { return panel >= first && panel < last; }
  };

  int64_t invert_block_factor(const Block& block);
  void sweep_panel(const Block& block, int64_t i);
  void write_inverse(const Block& block);
  void update_rows(const Block& block, int64_t first, int64_t last);

  T* row_panel(Buffer<T>& panels, int64_t panel) { return panels.data() + panel * block_size_ * kPanel; }

  const int64_t pivots_, panels_, block_size_;
  Buffer<T> tiles_;
  Buffer<T> products_;   // W_i^T of every panel i, [block][kPanel]
  Buffer<T> factor_;     // -L^T: panel k holds columns [block][kPanel]
  Buffer<T> inverse_;    // L^-1, its columns in panels [block][kPanel]
  Buffer<T> inverse_t_;  // L^-T likewise
};

}  // namespace kfac
