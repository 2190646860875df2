// Sums over a warp and over a block.
#pragma once

#include "kfac/device.h"

namespace kfac {

// The sum over the lanes of a warp, the same bits in each: a tree.
template <class Block, class T>
KFAC_DEVICE T warp_sum(Block& block, T value) {
  KFAC_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) value += block.shuffle_xor(value, mask);
  return value;
}

// values <- their sums over the block's threads, the same bits in each: a tree over the lanes of a warp, then the warps
// in order. memory: kCount kThreads / 32 doubles of shared memory; free again on return.
template <int kThreads, int kCount, class Block>
KFAC_DEVICE void block_sum(Block& block, double* memory, double (&values)[kCount]) {
  KFAC_UNROLL
  for (int i = 0; i < kCount; ++i) {
    values[i] = warp_sum(block, values[i]);
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
