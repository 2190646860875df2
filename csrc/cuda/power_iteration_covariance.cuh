// Power iteration of a covariance from its rows alone; who does what: kfac/power_iteration_covariance_group.h
#pragma once

#include "covariance_pack.cuh"
#include "kfac/power_iteration_covariance_group.h"
#include "power_iteration.cuh"

namespace kfac {

struct GramMemory {
  float *v, *sums;          // [n]
  float* dots;              // [kGramRows]: a.v
  int32_t *sample, *y, *x;  // [kGramRows]: the output position that is the row
};

KFAC_DEVICE GramMemory gram_memory(float* shared, int32_t n) {
  GramMemory memory{};
  memory.v = shared + kPowerSumFloats;
  memory.sums = memory.v + n;
  memory.dots = memory.sums + n;
  memory.sample = reinterpret_cast<int32_t*>(memory.dots + kGramRows);
  memory.y = memory.sample + kGramRows;
  memory.x = memory.y + kGramRows;
  return memory;
}

// The part of a.v that these channels of row `row` give.
KFAC_DEVICE float gram_dot(const PackJob& patches, const void* image, const GramMemory& memory, int32_t row,
                           int32_t first, int32_t end, int32_t step) {
  const int32_t sample = memory.sample[row], y = memory.y[row], x = memory.x[row];
  const int32_t taps = patches.taps.divisor, kernel_w = patches.kernel_w.divisor;
  float sum = 0.0f;
  for (int32_t channel = first; channel < end; channel += step) {
    const float* const v = memory.v + channel * taps;
    for (int32_t tap = 0, tap_y = 0; tap < taps; ++tap_y) {
      for (int32_t tap_x = 0; tap_x < kernel_w; ++tap_x, ++tap) {
        sum += v[tap] * patch_value(patches, image, sample, {channel, tap_y, tap_x, true}, y, x);
      }
    }
  }
  return sum;
}

// dots[row] <- a.v without the bias, with a warp a row: channels lie side by side.
template <class Block>
KFAC_DEVICE void gram_dots_along(Block& block, const PackJob& patches, const void* image, const GramMemory& memory,
                                 int32_t count) {
  const int32_t lane = block.thread() % 32;
  for (int32_t row = block.thread() / 32; row < count; row += kPowerWarps) {
    const float sum = warp_sum(block, gram_dot(patches, image, memory, row, lane, patches.group_channels, 32));
    if (lane == 0) memory.dots[row] = sum;
  }
}

// The same where pixels lie side by side: as many threads a row as there are for so few rows, each a part of the
// channels.
template <class Block>
KFAC_DEVICE void gram_dots_across(Block& block, const PackJob& patches, const void* image, const GramMemory& memory,
                                  int32_t count) {
  int32_t width = 1;
  while (width < count) width *= 2;
  const int32_t parts = kPowerThreads / width, part = block.thread() / width, row = block.thread() % width;
  const int64_t channels = patches.group_channels;
  float sum = 0.0f;
  if (row < count) {
    sum = gram_dot(patches, image, memory, row, int32_t(channels * part / parts),
                   int32_t(channels * (part + 1) / parts), 1);
  }
  if (parts > 1) {
    memory.dots[block.thread()] = sum;
    block.sync();
    if (part == 0) {
      for (int32_t p = 1; p < parts; ++p) sum += memory.dots[p * width + row];
    }
    block.sync();
  }
  if (part == 0) memory.dots[row] = sum;
}

// Sum of dots[row] a[entry] over rows first, first + step, ...
KFAC_DEVICE float gram_entry(const CovariancePowerJob& job, const void* image, const GramMemory& memory,
                             PackedColumn entry, int32_t first, int32_t step, int32_t count) {
  float sum = 0.0f;
  KFAC_UNROLL_BY(4)
  for (int32_t row = first; row < count; row += step) {
    sum += memory.dots[row] * patch_value(job.patches, image, memory.sample[row], entry, memory.y[row], memory.x[row]);
  }
  return sum;
}

// sums += dots[row] a over these rows: a warp an entry where pixels lie side by side, a thread where channels do, or
// where rows are few.
template <class Block>
KFAC_DEVICE void gram_accumulate(Block& block, const CovariancePowerJob& job, const void* image,
                                 const GramMemory& memory, int32_t count) {
  const PackJob& patches = job.patches;
  const int32_t lane = block.thread() % 32, warp = block.thread() / 32, entries = patches.group_columns;
  if (job.lanes_along_channels) {
    const int32_t taps = patches.taps.divisor, kernel_w = patches.kernel_w.divisor;
    for (int32_t at = block.thread(); at < entries; at += kPowerThreads) {
      const int32_t tap = at / patches.group_channels, channel = at - tap * patches.group_channels;
      const PackedColumn entry{channel, tap / kernel_w, tap % kernel_w, true};
      memory.sums[channel * taps + tap] += gram_entry(job, image, memory, entry, 0, 1, count);
    }
  } else if (count < kGramWarpRows) {
    for (int32_t at = block.thread(); at < entries; at += kPowerThreads) {
      memory.sums[at] += gram_entry(job, image, memory, packed_column(patches, at), 0, 1, count);
    }
  } else {
    for (int32_t at = warp; at < entries; at += kPowerWarps) {
      const float sum = warp_sum(block, gram_entry(job, image, memory, packed_column(patches, at), lane, 32, count));
      if (lane == 0) memory.sums[at] += sum;
    }
  }
  if (job.bias && warp == 0) {
    float sum = 0.0f;
    for (int32_t row = lane; row < count; row += 32) sum += memory.dots[row];
    sum = warp_sum(block, sum);
    if (lane == 0) memory.sums[entries] += sum;
  }
}

// sums <- (a.v) a added over the block's rows.
template <class Block>
KFAC_DEVICE void gram_sums(Block& block, const CovariancePowerJob& job, const void* image, RowRange rows,
                           const GramMemory& memory) {
  for (int32_t i = block.thread(); i < job.team.n; i += kPowerThreads) memory.sums[i] = 0.0f;
  for (int32_t done = 0; done < rows.count; done += kGramRows) {
    const int32_t count = smaller(kGramRows, rows.count - done), own = block.thread();
    if (own < count) {
      const PackedPosition position = packed_position(job.patches, rows.first + done + own);
      memory.sample[own] = position.sample;
      memory.y[own] = position.y;
      memory.x[own] = position.x;
    }
    block.sync();  // v and the rows' places are there
    if (job.lanes_along_channels) {
      gram_dots_along(block, job.patches, image, memory, count);
    } else {
      gram_dots_across(block, job.patches, image, memory, count);
    }
    block.sync();
    if (job.bias && own < count) memory.dots[own] += memory.v[job.team.n - 1];
    block.sync();
    gram_accumulate(block, job, image, memory, count);
    block.sync();
  }
}

// The block's share of A v, and what it adds to the moments; waits until everyone's sums are there.
template <class Block>
KFAC_DEVICE void gram_combine(Block& block, const CovariancePowerJob& job, int32_t rank, int32_t iteration,
                              const GramMemory& memory, float* workspace, double (&moments)[kPowerMoments]) {
  const EigenJob& team = job.team;
  float *const all = workspace + job.sums, *const image = workspace + team.images;
  block.sync();
  for (int32_t i = block.thread(); i < team.n; i += kPowerThreads) all[int64_t(rank) * team.n + i] = memory.sums[i];
  block.meet(reinterpret_cast<uint32_t*>(workspace + job.summed), uint32_t(iteration) * uint32_t(team.blocks));
  const RowRange share = team_rows(team, rank);
  for (int32_t i = share.first + block.thread(); i < share.first + share.count; i += kPowerThreads) {
    double total = 0.0;
    for (int32_t b = 0; b < team.blocks; ++b) total += all[int64_t(b) * team.n + i];
    const float value = float(total / gram_rows(job)), v = memory.v[i];
    image[i] = value;
    moments[0] += double(v) * v;
    moments[1] += double(v) * value;
    moments[2] += double(value) * value;
  }
}

template <class Block>
KFAC_DEVICE void covariance_power_iteration(Block& block, const CovariancePowerJob& job, const void* image,
                                            float* vector, const PowerMethod& method, float* workspace,
                                            const PowerResults& results) {
  const EigenJob& team = job.team;
  const int32_t rank = block.index();
  const GramMemory memory = gram_memory(block.shared(), team.n);
  const RowRange rows = gram_share(job, rank), entries = team_rows(team, rank);
  load_start(block, team, vector, memory.v);
  EigenState state{};
  int32_t iteration = 0;
  do {
    ++iteration;
    double moments[kPowerMoments] = {};
    gram_sums(block, job, image, rows, memory);
    gram_combine(block, job, rank, iteration, memory, workspace, moments);
    team_sum(block, team, rank, iteration, workspace, moments);
    state = judge(moments, method.tol);
    if (!state.moves) break;
    const float* const found = workspace + team.images;
    for (int32_t i = block.thread(); i < team.n; i += kPowerThreads) {
      memory.v[i] = found[i] * state.scale.power * state.scale.rest;
    }
  } while (!state.done && iteration < method.max_iter);
  block.sync();
  for (int32_t i = entries.first + block.thread(); i < entries.first + entries.count; i += kPowerThreads) {
    vector[i] = memory.v[i];
  }
  if (rank != 0 || block.thread() != 0) return;
  results.values[0] = float(state.value);
  results.residuals[0] = float(state.residual);
  results.iterations[0] = iteration;
}

}  // namespace kfac
