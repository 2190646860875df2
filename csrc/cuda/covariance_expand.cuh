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
  const int32_t taps = job.taps.divisor, at = p * taps + q;
  return {first + taps * taps + 1 + first[at], first[at + 1] - first[at]};
}

// Where a block of kExpandEdge channels by as many lies in the slots of a region of this shift, and how it is read. All
// terms of two kernel positions have the same shift.
struct RegionBlock {
  int64_t first;  // from the region's first tile to the block's first entry; lines are 2^edge_bits apart
  bool turned;    // lines of the block are columns (c', q)
  bool diagonal;  // of a symmetric product: only entries at and below the diagonal are read
};

// Of symmetric products only tiles and entries at or below the diagonal are read: the mirrored ones, where there are
// any, were added up in another order.
KFAC_DEVICE RegionBlock region_block(const ExpandJob& job, const ExpandWork& work, bool symmetric, bool transposed) {
  const bool turned = symmetric ? work.i < work.j : transposed;
  const int32_t row = (turned ? work.j : work.i) * kExpandEdge, column = (turned ? work.i : work.j) * kExpandEdge;
  const int32_t edge = 1 << job.edge_bits, inside = edge - 1;
  const int32_t pair = pair_number(row >> job.edge_bits, column >> job.edge_bits, job.side, symmetric);
  const int64_t tile = int64_t(work.group) * pair_count(job.side, symmetric) + pair;
  return {(tile << 2 * job.edge_bits) + (row & inside) * edge + (column & inside), turned,
          symmetric && work.i == work.j};
}

// The sums of one block of channels and all its kernel positions q, [32][32 q_count] in shared memory.
template <class Block>
KFAC_DEVICE void gather_terms(Block& block, const CovarianceSchedule& schedule, const ExpandJob& job,
                              const ExpandWork& work, const float* workspace) {
  float* const values = block.shared();
  const int32_t pitch = expand_pitch(job.tap_block);
  const int32_t line = block.thread() / kExpandVectors, start = block.thread() % kExpandVectors * 4;
  for (int32_t at = 0; at < work.q_count; ++at) {
    const int32_t q = work.q_first + at;
    const TermRange range = terms_of(schedule, job, work.p, q);
    const RegionBlock from = region_block(job, work, work.p == q, range.count > 0 && range.terms[0] % 2);
    const float* const entries = workspace + from.first + (line << job.edge_bits) + start;
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int32_t t = 0; t < range.count; ++t) {
      const Float4 part = load4(entries + schedule.regions[job.regions + range.terms[t] / 2].tiles);
      KFAC_UNROLL
      for (int e = 0; e < 4; ++e) sum[e] += part.value[e];
    }
    const int32_t line_step = from.turned ? work.q_count : pitch, entry_step = from.turned ? pitch : work.q_count;
    KFAC_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int32_t entry = start + e;
      if (from.diagonal && entry > line) continue;
      values[line * line_step + entry * entry_step + at] = sum[e];
      if (from.diagonal) values[entry * line_step + line * entry_step + at] = sum[e];
    }
  }
}

// Rows (c, p) and columns (c', q) for blocks of 32 channels c and c' and some q, gathered in shared memory.
template <class Block>
KFAC_DEVICE void expand_matrix(Block& block, const CovarianceSchedule& schedule, const ExpandJob& job,
                               const ExpandTarget& target, int32_t tile, const float* workspace) {
  constexpr int kAtOnce = 3;  // entries that a thread waits for together
  const ExpandWork work = expand_work(job, tile);
  const int32_t c = work.i * kExpandEdge, c2 = work.j * kExpandEdge;
  const int32_t rows = smaller(kExpandEdge, job.channels - c);
  const int32_t width = smaller(kExpandEdge, job.channels - c2) * work.q_count;
  const Divider per_channel = work.q_count == job.tap_block ? job.full_block : job.last_block;
  const float* const values = block.shared();
  block.sync();  // the tile before may still be read
  gather_terms(block, schedule, job, work, workspace);
  block.sync();
  for (int32_t i = block.thread() / 32; i < rows; i += kBlockThreads / 32) {
    const int64_t row = (int64_t(work.group) * job.d + (c + i) * int32_t(job.taps.divisor) + work.p) * job.d;
    float* const out = target.out + row;
    for (int32_t first = block.thread() % 32; first < width; first += 32 * kAtOnce) {
      int32_t place[kAtOnce];
      float old[kAtOnce] = {};
      KFAC_UNROLL
      for (int e = 0; e < kAtOnce; ++e) {
        const int32_t x = first + 32 * e, j = per_channel.quotient(x);
        place[e] = (c2 + j) * int32_t(job.taps.divisor) + work.q_first + x - j * work.q_count;
        // decay 0 forgets what `out` held, NaN included
        if (x < width && target.decay != 0.0f) old[e] = target.decay * out[place[e]];
      }
      KFAC_UNROLL
      for (int e = 0; e < kAtOnce; ++e) {
        const int32_t x = first + 32 * e;
        if (x < width) out[place[e]] = old[e] + target.scale * values[i * expand_pitch(job.tap_block) + x];
      }
    }
  }
}

template <class Block>
KFAC_DEVICE void expand_depthwise(Block& block, const CovarianceSchedule& schedule, const ExpandJob& job,
                                  const ExpandTarget& target, int32_t tile, const float* workspace) {
  const int32_t at = tile * kBlockThreads + block.thread(), group = job.tap_pairs.quotient(at);
  if (group >= job.groups) return;
  const int32_t pair = at - group * int32_t(job.tap_pairs.divisor), p = job.taps.quotient(pair);
  const int32_t q = pair - p * int32_t(job.taps.divisor);
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
  const int32_t at = tile * kBlockThreads + block.thread(), group = job.rows.quotient(at);
  if (group >= job.groups) return;
  const int32_t row = at - group * job.d, c = job.taps.quotient(row), p = row - c * int32_t(job.taps.divisor);
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
    const ExpandJob job = list.jobs[number];  // a copy: kept while entries are stored
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
