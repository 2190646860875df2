#include "kfac/covariance_group.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

#include "descriptors.h"

namespace kfac {
namespace {

constexpr int64_t kSlotFloats = 64;  // slots and packed rows begin on a multiple of 256 bytes

int32_t narrow(int64_t value, const char* what) {
  if (value < 0 || value > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("covariance: " + std::to_string(value) + " " + what + ", expected less than 2^31");
  }
  return static_cast<int32_t>(value);
}

Divider divider(int64_t value, const char* what) {
  return Divider(static_cast<uint32_t>(narrow(value, what)));
}

void refuse_float64(const CovarianceProblem& problem) {
  if (problem.dtype == DType::kFloat64) throw std::invalid_argument("covariance: float64 has no CUDA kernels");
}

bool is_depthwise(const ConvShape& packed) {
  return packed.groups > 1 && packed.group_channels() == 1;
}

// The convolution that is left to do once packed: 1 x 1 where packing has gathered or averaged the patches already.
ConvShape packed_shape(const ConvShape& shape, PackKind kind) {
  if (kind == PackKind::kImage) return shape;
  ConvShape packed{shape.samples, shape.groups * shape.patch_size(), 1, 1};
  if (kind == PackKind::kPatches) {
    packed.height = packed.out_h = shape.out_h;
    packed.width = packed.out_w = shape.out_w;
  }
  packed.groups = shape.groups;
  return packed;
}

// Predicted cost, in products of one row: a float that goes to memory and back costs as much as kFloatCost of them.
double group_cost(const ConvShape& packed) {
  constexpr double kFloatCost = 400;
  const int64_t channels = packed.group_channels(), bits = tile_edge_bits(channels);
  const int32_t side = int32_t(divide_up(channels, int64_t(1) << bits));
  double cost = kFloatCost * double(packed.samples * packed.height * packed.width * channels);
  const std::shared_ptr<const ShiftPlan> plan = shift_plan(packed);
  for (const Region& region : plan->regions) {
    const double rows = double(region.ny * region.nx * packed.samples), pairs = pair_count(side, region.symmetric());
    cost += pairs * double(1 << 2 * bits) * (rows + kFloatCost * std::ceil(rows / kChunkRows));
  }
  return cost;
}

PackKind pack_kind(const CovarianceProblem& problem) {
  if (problem.mode == CovarianceMode::kReduce) return PackKind::kMeans;
  if (problem.algorithm == CovarianceAlgorithm::kShift) return PackKind::kImage;
  if (problem.algorithm == CovarianceAlgorithm::kPatches) return PackKind::kPatches;
  if (problem.shape.taps() == 1) return PackKind::kImage;
  if (!has_small_plan(problem.shape)) return PackKind::kPatches;
  if (is_depthwise(problem.shape)) return PackKind::kImage;
  const double shift = group_cost(problem.shape);
  return group_cost(packed_shape(problem.shape, PackKind::kPatches)) < shift ? PackKind::kPatches : PackKind::kImage;
}

MmaMode mma_mode(const CovarianceProblem& problem) {
  if (problem.mode == CovarianceMode::kExpand) {  // averages of halves are none
    if (problem.dtype == DType::kBFloat16) return MmaMode::kBFloat16;
    if (problem.dtype == DType::kFloat16) return MmaMode::kFloat16;
  }
  return problem.precision == Precision::kTf32 ? MmaMode::kTf32 : MmaMode::kSplit;
}

PackJob pack_job(const CovarianceProblem& problem, const ConvShape& packed, PackKind kind) {
  const ConvShape& s = problem.shape;
  const bool depthwise = is_depthwise(packed), gathers = kind != PackKind::kImage;
  PackJob job{};
  job.kind = kind;
  job.dtype = problem.dtype;
  job.packed_dtype = packed_dtype(mma_mode(problem));
  job.round_to_tf32 = mma_mode(problem) == MmaMode::kTf32 && !depthwise;
  job.stride_n = problem.stride_n;
  job.stride_c = problem.stride_c;
  job.stride_h = problem.stride_h;
  job.stride_w = problem.stride_w;
  job.samples = narrow(s.samples, "samples");
  job.height = narrow(s.height, "pixels high");
  job.width = narrow(s.width, "pixels wide");
  job.pixel_width = divider(packed.width, "pixels wide");
  job.pixels = divider(packed.height * packed.width, "pixels");
  narrow(s.samples * packed.height * packed.width, "rows");
  narrow(s.samples * s.height * s.width, "rows");
  const int64_t step =
      packed.height * packed.width == 1 ? s.height * s.width == 1 ? problem.stride_n : 1 : problem.stride_w;
  job.lanes_along_columns = problem.stride_c < step;
  job.kernel_w = divider(gathers ? s.kernel_w : 1, "kernel columns");
  job.taps = divider(gathers ? s.taps() : 1, "kernel positions");
  job.conv_stride_h = narrow(gathers ? s.stride_h : 1, "pixels of stride");
  job.conv_stride_w = narrow(gathers ? s.stride_w : 1, "pixels of stride");
  job.pad_top = narrow(gathers ? s.pad_top : 0, "pixels of padding");
  job.pad_left = narrow(gathers ? s.pad_left : 0, "pixels of padding");
  job.dilation_h = narrow(gathers ? s.dilation_h : 1, "pixels of dilation");
  job.dilation_w = narrow(gathers ? s.dilation_w : 1, "pixels of dilation");
  job.out_h = narrow(s.out_h, "output rows");
  job.out_w = narrow(s.out_w, "output columns");
  job.output_w = divider(s.out_w, "output columns");
  job.group_columns = narrow(depthwise ? packed.groups : packed.group_channels(), "columns");
  job.group_channels = job.group_columns / int32_t(job.taps.divisor);
  // 16 bytes are what one asynchronous copy takes
  const int64_t groups = depthwise ? 1 : packed.groups;
  const int64_t group_pitch = align_up(int64_t(job.group_columns), 16 / element_bytes(job.packed_dtype));
  job.group_pitch = divider(group_pitch, "columns");
  job.row_pitch = narrow(groups * group_pitch, "columns");
  job.column_tiles = divider(divide_up(job.row_pitch, kPackColumns), "columns");
  return job;
}

RegionRows region_rows(const Region& region, const ConvShape& packed) {
  const int64_t samples = packed.samples, row = packed.width * samples;
  int64_t inner = samples, middle = region.nx, middle_stride = packed.stride_w * samples;
  int64_t outer = region.ny, outer_stride = packed.stride_h * row;
  if (packed.stride_w == 1) inner *= std::exchange(middle, 1);
  if (middle == 1 && outer_stride == inner) inner *= std::exchange(outer, 1);
  return {uint32_t(outer * middle * inner),
          uint32_t(middle_stride),
          uint32_t(outer_stride),
          uint32_t((region.y0 * packed.width + region.x0) * samples),
          int32_t((region.shift_y * packed.width + region.shift_x) * samples),
          Divider(uint32_t(inner)),
          Divider(uint32_t(middle))};
}

}  // namespace

PackJob patch_job(const CovarianceProblem& problem) {
  refuse_float64(problem);
  return pack_job(problem, packed_shape(problem.shape, PackKind::kPatches), PackKind::kPatches);
}

struct CovarianceGroup::Builder {
  template <class Job>
  struct Jobs {
    std::vector<Job> jobs;
    std::vector<int64_t> tiles;
    void add(const Job& job, int64_t count) {
      if (count == 0) return;
      jobs.push_back(job);
      tiles.push_back(count);
    }
    // The costliest tiles first, so that the last ones to finish are short.
    template <class Cost>
    void sort_by_cost(Cost cost) {
      std::vector<size_t> order(jobs.size());
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return cost(jobs[a]) > cost(jobs[b]); });
      const Jobs before = *this;
      for (size_t i = 0; i < order.size(); ++i) {
        jobs[i] = before.jobs[order[i]];
        tiles[i] = before.tiles[order[i]];
      }
    }
  };

  Jobs<PackJob> pack, means;
  Jobs<TileJob> wide_tiles[kMmaModes], tiles[kMmaModes];
  Jobs<LaneJob> lanes;
  Jobs<ReduceJob> reduce;
  Jobs<ExpandJob> expand;
  std::vector<RegionSlots> regions;
  std::vector<int32_t> terms;
  int64_t floats = 0;
  CovarianceCounts counts;

  int64_t allocate(int64_t count) { return std::exchange(floats, align_up(floats + count, kSlotFloats)); }

  void add_layer(int layer, const CovarianceProblem& problem) {
    refuse_float64(problem);
    const PackKind kind = pack_kind(problem);
    const ConvShape packed = packed_shape(problem.shape, kind);
    PackJob job = pack_job(problem, packed, kind);
    job.layer = layer;
    const int64_t packed_bytes = int64_t(packed_rows(job)) * job.row_pitch * element_bytes(job.packed_dtype);
    job.packed = allocate(divide_up(packed_bytes, 4));
    (kind == PackKind::kMeans ? means : pack).add(job, pack_tiles(job));
    const ConvShape& s = problem.shape;
    counts.inputs += double(s.samples * s.channels * s.height * s.width);
    counts.packed += double(packed_bytes) / 4;

    const std::shared_ptr<const ShiftPlan> plan = shift_plan(packed);
    add_expand(layer, packed, *plan, problem.bias, job);
    for (const Region& region : plan->regions) add_region(region, packed, problem, job);
  }

  void add_region(const Region& region, const ConvShape& packed, const CovarianceProblem& problem,
                  const PackJob& source) {
    const RegionRows rows = region_rows(region, packed);
    const bool depthwise = is_depthwise(packed);
    RegionSlots slots{-1, -1, region.symmetric()};
    slots.tiles = depthwise ? add_lanes(rows, source, true) : add_tiles(rows, region, packed, problem, source);
    if (problem.bias && region.symmetric()) slots.columns = add_lanes(rows, source, false);
    regions.push_back(slots);
  }

  int64_t add_lanes(const RegionRows& rows, const PackJob& source, bool product) {
    const uint32_t chunk = chunk_rows(rows.count, kLaneRows);
    LaneJob job{rows, chunk, source.packed_dtype, source.row_pitch, product, source.packed, 0};
    const int64_t chunks = divide_up(rows.count, job.chunk);
    job.slot = allocate(chunks * job.row_pitch);
    lanes.add(job, chunks * divide_up(job.row_pitch, kLaneColumns));
    add_reduce(job.slot, job.row_pitch, chunks);
    return job.slot;
  }

  int64_t add_tiles(const RegionRows& rows, const Region& region, const ConvShape& packed,
                    const CovarianceProblem& problem, const PackJob& source) {
    TileJob job{};
    job.rows = rows;
    job.edge = 1 << tile_edge_bits(source.group_columns);
    job.chunk = chunk_rows(rows.count, stage_rows(job.edge, source.packed_dtype));
    job.groups = narrow(packed.groups, "groups");
    job.side = narrow(divide_up(source.group_columns, job.edge), "column tiles");
    job.symmetric = region.symmetric();
    job.pairs = pair_count(job.side, job.symmetric);
    job.group_pitch = int32_t(source.group_pitch.divisor);
    job.row_pitch = source.row_pitch;
    job.packed = source.packed;
    const int64_t chunks = divide_up(rows.count, job.chunk), count = int64_t(job.groups) * job.pairs;
    const int64_t length = count * job.edge * job.edge;
    job.slot = allocate(chunks * length);
    counts.products += double(length) * rows.count;
    const int64_t times = job.symmetric ? job.side + 1 : 2 * job.side;  // that a row is read
    counts.tile_reads +=
        0.25 * double(element_bytes(source.packed_dtype) * job.groups * times) * job.group_pitch * rows.count;
    counts.slots += double(chunks * length);
    tiles[int(mma_mode(problem))].add(job, chunks * count);
    add_reduce(job.slot, length, chunks);
    return job.slot;
  }

  // Makes wide tiles of two squares each where there are enough of them, counted in the longest. The split mode needs
  // its registers for other things.
  void widen(MmaMode mode, int64_t least) {
    const Jobs<TileJob> before = tiles[int(mode)];
    Jobs<TileJob> wide, rest;
    double rows = 0, longest = 1;
    for (size_t n = 0; n < before.jobs.size(); ++n) {
      const TileJob& job = before.jobs[n];
      const bool cut = mode != MmaMode::kSplit && job.edge == 128;
      if (!cut) rest.add(job, before.tiles[n]);
      for (const TilePart part : {TilePart::kWide, TilePart::kRest}) {
        TileJob own = job;
        own.part = part;
        own.pairs = part_count(part, job.side, job.symmetric);
        if (cut) (part == TilePart::kWide ? wide : rest).add(own, before.tiles[n] / job.pairs * own.pairs);
      }
    }
    double saved = 0;
    for (const TileJob& job : wide.jobs) {
      const double tiled = double(job.groups) * job.rows.count;
      rows += tiled * job.pairs;
      longest = std::max(longest, double(job.chunk));
      // columns A of a pair are read once, not twice; the last square along an edge may have fewer
      const int64_t padding = int64_t(job.side) * job.edge - job.group_pitch;
      saved += tiled * double(int64_t(job.pairs) * job.edge - job.side / 2 * padding);
    }
    if (wide.jobs.empty() || rows < double(least) * longest) return;
    wide_tiles[int(mode)] = wide;
    tiles[int(mode)] = rest;
    counts.tile_reads -= 0.25 * double(element_bytes(packed_dtype(mode))) * saved;
  }

  void add_reduce(int64_t slot, int64_t length, int64_t chunks) {
    if (chunks > 1) reduce.add({slot, length, int32_t(chunks)}, divide_up(length, kReduceElements));
  }

  void add_expand(int layer, const ConvShape& packed, const ShiftPlan& plan, bool bias, const PackJob& source) {
    const bool depthwise = is_depthwise(packed);
    ExpandJob job{};
    job.layer = layer;
    job.kind = depthwise ? ExpandKind::kDepthwise : ExpandKind::kMatrix;
    job.d = narrow(packed.patch_size() + bias, "entries of a patch");
    job.taps = divider(packed.taps(), "kernel positions");
    job.tap_pairs = divider(packed.taps() * packed.taps(), "pairs of kernel positions");
    job.rows = divider(job.d, "entries of a patch");
    job.groups = narrow(packed.groups, "groups");
    job.channels = narrow(packed.group_channels(), "channels");
    job.edge_bits = tile_edge_bits(source.group_columns);
    job.side = int32_t(divide_up(source.group_columns, 1 << job.edge_bits));
    job.blocks = divider(divide_up(job.channels, kExpandEdge), "blocks of channels");
    const int64_t taps = packed.taps(), blocks = job.blocks.divisor;
    job.tap_block = int32_t(smaller<int64_t>(taps, kMaxTapBlock));
    const int64_t tap_blocks = divide_up(taps, job.tap_block);
    job.tap_blocks = divider(tap_blocks, "blocks of kernel positions");
    job.full_block = divider(job.tap_block, "kernel positions");
    job.last_block = divider(taps - (tap_blocks - 1) * job.tap_block, "kernel positions");
    job.lane_group_pitch = depthwise ? 1 : int32_t(source.group_pitch.divisor);
    job.count = float(packed.samples * packed.out_h * packed.out_w);
    counts.outputs += double(job.groups) * job.d * job.d;
    job.terms = int32_t(terms.size());
    job.regions = int32_t(regions.size());
    add_terms(plan);
    if (depthwise) {
      expand.add(job, divide_up(narrow(job.groups * taps * taps + kBlockThreads, "entries"), kBlockThreads));
    } else {
      expand.add(job, job.groups * tap_blocks * taps * blocks * blocks);
    }
    job.kind = ExpandKind::kBias;
    if (bias) expand.add(job, divide_up(narrow(int64_t(job.groups) * job.d + kBlockThreads, "rows"), kBlockThreads));
  }

  void add_terms(const ShiftPlan& plan) {
    for (const int64_t first : plan.first_term) terms.push_back(int32_t(first));
    for (const Term& term : plan.terms) terms.push_back(2 * term.region + term.transposed);
  }

  template <class Job>
  static Span<Job> store(const Jobs<Job>& list, std::vector<char>& bytes) {
    std::vector<int32_t> first{0};
    int64_t tiles = 0;
    for (const int64_t count : list.tiles) first.push_back(narrow(tiles += count, "tiles"));
    Span<Job> span;
    span.jobs = append(bytes, list.jobs);
    span.first = append(bytes, first);
    span.count = int32_t(list.jobs.size());
    span.tiles = first.back();
    return span;
  }
};

CovarianceGroup::CovarianceGroup(const std::vector<CovarianceProblem>& problems, int64_t least_wide_tiles)
    : layers_(int(problems.size())) {
  if (problems.size() > size_t(kMaxGroupLayers)) {
    throw std::invalid_argument("covariance: " + std::to_string(problems.size()) +
                                " layers in one group, expected at most " + std::to_string(kMaxGroupLayers));
  }
  Builder builder;
  for (int layer = 0; layer < layers_; ++layer) builder.add_layer(layer, problems[layer]);
  for (int mode = 0; mode < kMmaModes; ++mode) {
    builder.tiles[mode].sort_by_cost([](const TileJob& job) { return int64_t(job.edge) * job.edge * job.chunk; });
    builder.widen(MmaMode(mode), least_wide_tiles);
    wide_tiles_[mode] = Builder::store(builder.wide_tiles[mode], descriptors_);
    tiles_[mode] = Builder::store(builder.tiles[mode], descriptors_);
  }
  pack_ = Builder::store(builder.pack, descriptors_);
  means_ = Builder::store(builder.means, descriptors_);
  lanes_ = Builder::store(builder.lanes, descriptors_);
  reduce_ = Builder::store(builder.reduce, descriptors_);
  expand_ = Builder::store(builder.expand, descriptors_);
  regions_ = append(descriptors_, builder.regions);
  terms_ = append(descriptors_, builder.terms);
  workspace_floats_ = builder.floats;
  counts_ = builder.counts;
}

template <class Job>
JobList<Job> CovarianceGroup::Span<Job>::at(const char* base) const {
  return {reinterpret_cast<const Job*>(base + jobs), reinterpret_cast<const int32_t*>(base + first), count, tiles};
}

CovarianceSchedule CovarianceGroup::schedule(const void* descriptors) const {
  const char* base = static_cast<const char*>(descriptors);
  CovarianceSchedule schedule{};
  schedule.pack = pack_.at(base);
  schedule.means = means_.at(base);
  for (int mode = 0; mode < kMmaModes; ++mode) {
    schedule.wide_tiles[mode] = wide_tiles_[mode].at(base);
    schedule.tiles[mode] = tiles_[mode].at(base);
  }
  schedule.lanes = lanes_.at(base);
  schedule.reduce = reduce_.at(base);
  schedule.expand = expand_.at(base);
  schedule.regions = reinterpret_cast<const RegionSlots*>(base + regions_);
  schedule.terms = reinterpret_cast<const int32_t*>(base + terms_);
  return schedule;
}

}  // namespace kfac
