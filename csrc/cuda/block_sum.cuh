// Sums over a block.
#pragma once

#include "kfac/device.h"

namespace kfac {

// values <- their sums over the block's threads, the same bits in each: a tree over the lanes of a warp, then the warps
// in order. memory: kCount kThreads / 32 doubles of shared memory; free again on return.
template <int kThreads, int kCount, class Block>
KFAC_DEVICE void block_sum(Block& block, double* memory, double (&values)[kCount]) {
  KFAC_UNROLL
  for (int i = 0; i < kCount; ++i) {
    KFAC_UNROLL
    for (int mask = 16; mask > 0; mask /= 2) values[i] += block.shuffle_xor(values[i], mask);
    if (block.thread() % 32 == 0) memory[block.thread() / 32 * kCount + i] = values[i];
  }
  block.sync();
  KFAC_UNROLL
  for (int i = 0; i < kCount; ++i) {
    values[i] = 0.0;
    for (int warp = 0; warp < kThreads / 32; ++warp) values[i] += memory[warp * kCount + i];
  }
  block.sync();
}

}  // namespace kfac
