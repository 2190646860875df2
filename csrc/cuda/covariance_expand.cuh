// expand: region sums -> out <- decay out + scale A, both triangles and the bias row and column.
#pragma once

#include "kfac/covariance_group.h"

namespace kfac {

struct ExpandTarget {
  float* out;  // [groups, d, d]
  float decay, scale;
};

KFAC_DEVICE void blend(const ExpandTarget& target, int64_t at, float value) {
  const float scaled = target.scale * value;
  // decay 0 forgets what `out` held, NaN included
  target.out[at] = target.decay == 0.0f ? scaled : target.decay * target.out[at] + scaled;
}

// The terms of block (p, q) of a layer.
struct TermRange {
  const int32_t* terms;
  int32_t count;
};

KFAC_DEVICE TermRange terms_of(const CovarianceSchedule& schedule, const ExpandJob& job, int32_t p, int32_t q) {
  const int32_t* const first = schedule.terms + job.terms;
  const int32_t blocks = job.taps * job.taps, at = p * job.taps + q;
  return {first + blocks + 1 + first[at], first[at + 1] - first[at]};
}

// Entry (a, b) of a region's product in one group. Of symmetric ones only a >= b is read: the mirrored entry, where
// there is one, was added up in another order.
KFAC_DEVICE float region_entry(const ExpandJob& job, const RegionSlots& region, const float* workspace, int32_t group,
                               int32_t a, int32_t b) {
  const bool mirrored = region.symmetric && a < b;
  const int32_t row = mirrored ? b : a, column = mirrored ? a : b, edge = 1 << job.edge_bits;
  const int32_t pair = pair_number(row >> job.edge_bits, column >> job.edge_bits, job.side, region.symmetric);
  const int64_t tile = int64_t(group) * pair_count(job.side, region.symmetric) + pair;
  return workspace[region.tiles + (tile << 2 * job.edge_bits) + ((row & (edge - 1)) << job.edge_bits) +
                   (column & (edge - 1))];
}

// Rows (c, p) and columns (c', q) for blocks of 32 channels c and c' and some q, gathered in shared memory.
template <class Block>
KFAC_DEVICE void expand_matrix(Block& block, const CovarianceSchedule& schedule, const ExpandJob& job,
                               const ExpandTarget& target, int32_t tile, const float* workspace) {
  const ExpandWork work = expand_work(job, tile);
  float* const values = block.shared();  // [32][32 tap_block + 1]
  const int32_t pitch = expand_pitch(job.tap_block), lane = block.thread() % 32, line = block.thread() / 32;
  block.sync();
  for (int32_t at = 0; at < work.q_count; ++at) {
    const TermRange range = terms_of(schedule, job, work.p, work.q_first + at);
    // all terms of a block have the same shift, so all are transposed or none is; lanes run along memory
    const bool transposed = range.count > 0 && (range.terms[0] % 2 || (work.p == work.q_first + at && work.i < work.j));
    for (int32_t step = line; step < kExpandEdge; step += kBlockThreads / 32) {
      const int32_t i = transposed ? lane : step, j = transposed ? step : lane;
      const int32_t c = work.i * kExpandEdge + i, c2 = work.j * kExpandEdge + j;
      float sum = 0.0f;
      if (c < job.channels && c2 < job.channels) {
        for (int32_t t = 0; t < range.count; ++t) {
          const RegionSlots& region = schedule.regions[job.regions + range.terms[t] / 2];
          const bool swap = range.terms[t] % 2;
          sum += region_entry(job, region, workspace, work.group, swap ? c2 : c, swap ? c : c2);
        }
      }
      values[i * pitch + j * job.tap_block + at] = sum;
    }
  }
  block.sync();
  const int32_t width = kExpandEdge * work.q_count;
  for (int32_t at = block.thread(); at < kExpandEdge * width; at += kBlockThreads) {
    const int32_t i = at / width, j = at % width / work.q_count, tap = at % work.q_count;
    const int32_t c = work.i * kExpandEdge + i, c2 = work.j * kExpandEdge + j;
    if (c >= job.channels || c2 >= job.channels) continue;
    const int64_t row = int64_t(work.group) * job.d + c * job.taps + work.p;
    blend(target, row * job.d + c2 * job.taps + work.q_first + tap, values[i * pitch + j * job.tap_block + tap]);
  }
}

template <class Block>
KFAC_DEVICE void expand_depthwise(Block& block, const CovarianceSchedule& schedule, const ExpandJob& job,
                                  const ExpandTarget& target, int32_t tile, const float* workspace) {
  const int64_t at = int64_t(tile) * kBlockThreads + block.thread(), blocks = int64_t(job.taps) * job.taps;
  if (at >= job.groups * blocks) return;
  const int32_t group = int32_t(at / blocks), p = int32_t(at % blocks) / job.taps, q = int32_t(at % blocks) % job.taps;
  const TermRange range = terms_of(schedule, job, p, q);
  float sum = 0.0f;
  for (int32_t t = 0; t < range.count; ++t) {
    sum += workspace[schedule.regions[job.regions + range.terms[t] / 2].tiles + group];
  }
  blend(target, (int64_t(group) * job.d + p) * job.d + q, sum);
}

// The last row and column: sums of the patches themselves, and their number in the corner.
template <class Block>
KFAC_DEVICE void expand_bias(Block& block, const CovarianceSchedule& schedule, const ExpandJob& job,
                             const ExpandTarget& target, int32_t tile, const float* workspace) {
  const int64_t at = int64_t(tile) * kBlockThreads + block.thread();
  if (at >= int64_t(job.groups) * job.d) return;
  const int32_t group = int32_t(at / job.d), row = int32_t(at % job.d), c = row / job.taps, p = row % job.taps;
  const int64_t base = int64_t(group) * job.d * job.d, last = job.d - 1;
  if (row == last) {
    blend(target, base + last * job.d + last, job.count);
    return;
  }
  const TermRange range = terms_of(schedule, job, p, p);
  float sum = 0.0f;
  for (int32_t t = 0; t < range.count; ++t) {
    const RegionSlots& region = schedule.regions[job.regions + range.terms[t] / 2];
    sum += workspace[region.columns + int64_t(group) * job.lane_group_pitch + c];
  }
  blend(target, base + int64_t(row) * job.d + last, sum);
  blend(target, base + last * job.d + row, sum);
}

template <class Block>
KFAC_DEVICE void covariance_expand(Block& block, const CovarianceSchedule& schedule, const ExpandPointers& pointers,
                                   const float* workspace) {
  const JobList<ExpandJob>& list = schedule.expand;
  int32_t number = 0;
  for (int32_t tile = block.index(); tile < list.tiles; tile += block.count()) {
    number = job_of_tile(list.first, number, tile);
    const ExpandJob& job = list.jobs[number];
    const ExpandTarget target{pointers.out[job.layer], pointers.decay[job.layer], pointers.scale[job.layer]};
    const int32_t own = tile - list.first[number];
    if (job.kind == ExpandKind::kMatrix) {
      expand_matrix(block, schedule, job, target, own, workspace);
    } else if (job.kind == ExpandKind::kDepthwise) {
      expand_depthwise(block, schedule, job, target, own, workspace);
    } else {
      expand_bias(block, schedule, job, target, own, workspace);
    }
  }
}

}  // namespace kfac
