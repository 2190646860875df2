#include "kfac/covariance.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "kfac/parallel.h"
#include "panel_source.h"
#include "rows_covariance.h"

namespace kfac {
namespace {

constexpr int64_t kShareBytes = 256 << 10;  // packed samples a thread works on alone: a part of its second-level cache
constexpr int64_t kSharedBytes = 4 << 20;   // packed samples that all threads work on together
constexpr int64_t kColumnBlock = 4;         // panels that a panel is multiplied with before the next region is begun
constexpr int64_t kRunRows = 4096;          // of a running sum in the precision of the result
constexpr int64_t kPrivateBytes = 768 << 10;  // sums small enough for every thread to have its own

// Where the sums of all regions lie: first the channel sums that the bias row needs, then a tile [kPanel][kPanel] for
// every pair (i, j) of a group's panels (j <= i where symmetric), or one [kPanel] vector a panel for depthwise layers.
class SumLayout {
 public:
  SumLayout(const ShiftPlan& plan, int64_t groups, int64_t panels_per_group, int64_t panels, bool depthwise, bool bias)
      : panels_per_group_(panels_per_group) {
    const auto take = [&](Checked more) { return std::exchange(size_, (more + size_).value()); };
    const Checked lanes = Checked(panels) * kPanel;
    for (const Region& region : plan.regions) columns_.push_back(take(bias && region.symmetric() ? lanes : 0));
    for (const Region& region : plan.regions) {
      const int64_t p = panels_per_group;
      stride_.push_back(depthwise ? kPanel : (region.symmetric() ? p * (p + 1) / 2 : p * p) * kTile);
      tiles_.push_back(take(depthwise ? lanes : Checked(groups) * stride_.back()));
    }
  }

  int64_t size() const { return size_; }
  int64_t tile(const Region& region, int number, int64_t group, int64_t i, int64_t j) const {
    const int64_t pair = region.symmetric() ? i * (i + 1) / 2 + j : i * panels_per_group_ + j;
    return tiles_[number] + group * stride_[number] + pair * kTile;
  }
  int64_t lanes(int number, int64_t panel) const { return tiles_[number] + panel * kPanel; }
  int64_t columns(int number, int64_t panel) const { return columns_[number] + panel * kPanel; }

 private:
  int64_t panels_per_group_, size_ = 0;
  std::vector<int64_t> tiles_, stride_, columns_;
};

// Sums of many rows in two steps, a run of rows and then the runs: what rounding loses does not grow with all the rows.
template <class T>
class TwoLevelSums {
 public:
  TwoLevelSums(T* sums, int64_t size, int64_t rows)
      : sums_(sums), size_(size), totals_(rows > 2 * kRunRows ? size : 0, T(0)) {}

  // These rows have been added to the sums.
  void add(int64_t rows) {
    if (totals_.empty() || (rows_ += rows) < kRunRows) return;
    end_run();
  }

  // Leaves all rows in the sums.
  void finish() {
    if (totals_.empty()) return;
    end_run();
    std::copy_n(totals_.data(), size_, sums_);
  }

 private:
  void end_run() {
    for (int64_t i = 0; i < size_; ++i) totals_[i] += std::exchange(sums_[i], T(0));
    rows_ = 0;
  }

  T* const sums_;
  const int64_t size_;
  Buffer<T> totals_;
  int64_t rows_ = 0;
};

template <class T>
class Covariance {
 public:
  Covariance(const PanelSource<T>& source, bool bias, int threads)
      : source_(source),
        shape_(source.packed()),
        kept_plan_(shift_plan(shape_)),
        plan_(*kept_plan_),
        layout_(plan_, shape_.groups, source.panels_per_group(), source.panels(), source.depthwise(), bias),
        bias_(bias),
        threads_(threads) {}

  void run(double decay, double scale, T* out) {
    const int64_t shares = std::min<int64_t>(threads_, shape_.samples);
    if (shares > 1 && layout_.size() * int64_t(sizeof(T)) > kPrivateBytes) {
      sums_.assign(elements<T>(layout_.size()), T(0));
      sum_together();
    } else {
      sums_.assign(elements<T>(Checked(shares) * layout_.size()), T(0));
      parallel_for(shares, threads_, [&](int64_t share) { sum_share(share, shares); });
      add_shares(shares);
    }
    expand(T(decay), T(scale), out);
  }

 private:
  int64_t sample_bytes() const { return int64_t(source_.packed_size(1) * sizeof(T)); }
  int64_t chunk(int64_t bytes, int64_t samples) const {
    return std::min(samples, std::max<int64_t>(1, bytes / sample_bytes()));
  }
  T* panel(T* packed, int64_t number, int64_t samples) const {
    return packed + number * source_.order().pixels() * samples * kPanel;
  }

  // Every thread packs and sums its own samples.
  void sum_share(int64_t share, int64_t shares) {
    const int64_t end = (share + 1) * shape_.samples / shares;
    int64_t first = share * shape_.samples / shares;
    const int64_t step = chunk(kShareBytes, end - first);
    Buffer<T> packed(source_.packed_size(step)), scratch(source_.scratch_size());
    T* sums = sums_.data() + share * layout_.size();
    TwoLevelSums<T> levels(sums, layout_.size(), (end - first) * source_.order().pixels());
    for (; first < end; first += step) {
      const int64_t samples = std::min(step, end - first);
      for (int64_t p = 0; p < source_.panels(); ++p) {
        check_interrupt();
        source_.pack(first, samples, p, panel(packed.data(), p, samples), scratch.data());
      }
      for (int64_t task = 0; task < tasks(); ++task) {
        check_interrupt();
        sum_task(task, packed.data(), samples, sums);
      }
      levels.add(samples * source_.order().pixels());
    }
    levels.finish();
  }

  // All threads pack the same samples, then each sums other tiles.
  void sum_together() {
    const int64_t step = chunk(kSharedBytes, shape_.samples);
    const int workers = int(std::min<int64_t>(threads_, source_.panels()));
    const size_t own = source_.scratch_size();
    Buffer<T> packed(source_.packed_size(step)), scratch(elements<T>(Checked(int64_t(own)) * workers));
    TwoLevelSums<T> levels(sums_.data(), layout_.size(), shape_.samples * source_.order().pixels());
    for (int64_t first = 0; first < shape_.samples; first += step) {
      const int64_t samples = std::min(step, shape_.samples - first);
      parallel_for(source_.panels(), workers, [&](int64_t p, int worker) {
        source_.pack(first, samples, p, panel(packed.data(), p, samples), scratch.data() + worker * own);
      });
      parallel_for(tasks(), threads_, [&](int64_t task) { sum_task(task, packed.data(), samples, sums_.data()); });
      levels.add(samples * source_.order().pixels());
    }
    levels.finish();
  }

  void add_shares(int64_t shares) {
    for (int64_t share = 1; share < shares; ++share) {
      const T* other = sums_.data() + share * layout_.size();
      for (int64_t i = 0; i < layout_.size(); ++i) sums_[i] += other[i];
    }
  }

  // A task is a panel i with a few panels j of its group, over all regions: what it reads stays in the cache.
  int64_t column_blocks() const { return divide_up(source_.panels_per_group(), kColumnBlock); }
  int64_t tasks() const { return source_.panels() * column_blocks(); }

  void sum_task(int64_t task, T* packed, int64_t samples, T* sums) const {
    const int64_t p = source_.panels() - 1 - task / column_blocks();  // panels with the most tiles first
    const int64_t per_group = source_.panels_per_group(), group = p / per_group, i = p % per_group;
    const int64_t first = task % column_blocks() * kColumnBlock, last = std::min(first + kColumnBlock, per_group);
    const PanelKernels<T>& kernels = panel_kernels<T>();
    const PixelOrder& order = source_.order();
    for (int number = 0; number < int(plan_.regions.size()); ++number) {
      const Region& region = plan_.regions[number];
      const int64_t start = order.start(region, samples), shifted = order.start(region, samples, true);
      const Runs runs = order.runs(region, samples);
      const T* a = panel(packed, p, samples) + start;
      if (bias_ && region.symmetric() && first == 0) {
        kernels.column_sums(runs, a, sums + layout_.columns(number, p));
      }
      if (source_.depthwise()) {
        kernels.gram_diagonal(runs, a, panel(packed, p, samples) + shifted, sums + layout_.lanes(number, p));
        continue;
      }
      for (int64_t j = first; j < (region.symmetric() ? std::min(last, i + 1) : last); ++j) {
        const T* b = panel(packed, group * per_group + j, samples) + shifted;
        kernels.gram(runs, a, b, channels_in(i), sums + layout_.tile(region, number, group, i, j));
      }
    }
  }

  // ---- from regions to the patch covariance ----

  // What a thread needs to expand a panel.
  struct ExpandMemory {
    ExpandMemory(const ShiftPlan& plan, const ConvShape& shape)
        : scratch(elements<T>(Checked(int64_t(2 * plan.regions.size())) * kTile)),
          lines(elements<T>(Checked(shape.taps()) * kPanel)),
          tiles(2 * plan.regions.size()),
          terms(plan.first_term.back()) {}

    Buffer<T> scratch, lines;
    std::vector<const T*> tiles, terms;
  };

  void expand(T decay, T scale, T* out) const {
    const int64_t d = shape_.patch_size() + (bias_ ? 1 : 0);
    if (source_.depthwise()) {
      parallel_for(shape_.groups, threads_, [&](int64_t g) { expand_depthwise(g, decay, scale, out + g * d * d); });
      if (!bias_) return;
    } else {
      const int64_t per_group = source_.panels_per_group();
      std::vector<ExpandMemory> memory;
      memory.reserve(threads_);
      while (int64_t(memory.size()) < std::min<int64_t>(threads_, source_.panels())) memory.emplace_back(plan_, shape_);
      parallel_for(source_.panels(), int(memory.size()), [&](int64_t p, int worker) {
        expand_panel(p / per_group, p % per_group, decay, scale, out + p / per_group * d * d, d, memory[worker]);
      });
    }
    if (bias_) {
      for (int64_t g = 0; g < shape_.groups; ++g) expand_bias(g, decay, scale, out + g * d * d, d);
    }
  }

  // Channels of the group in its panel i.
  int channels_in(int64_t i) const { return int(std::min<int64_t>(kPanel, shape_.group_channels() - i * kPanel)); }

  static T blend(T old, T value, T decay, T scale) { return decay == 0 ? scale * value : decay * old + scale * value; }

  // Rows (c, p) of the channels c of panel i, all columns (c', q).
  void expand_panel(int64_t group, int64_t i, T decay, T scale, T* out, int64_t d, ExpandMemory& memory) const {
    const PanelKernels<T>& kernels = panel_kernels<T>();
    const int64_t taps = shape_.taps(), rows = channels_in(i);
    auto& [scratch, lines, tiles, terms] = memory;
    for (int64_t j = 0; j < source_.panels_per_group(); ++j) {
      orient_tiles(group, i, j, scratch.data(), tiles.data());
      T* target = out + (i * d + j) * kPanel * taps;
      if (taps == 1 && !plan_.regions.empty()) {
        kernels.blend_tile(tiles[0], kPanel, rows, channels_in(j), decay, scale, target, d);
        continue;
      }
      for (size_t t = 0; t < terms.size(); ++t) terms[t] = tiles[2 * plan_.terms[t].region + plan_.terms[t].transposed];
      for (int64_t c = 0; c < rows; ++c) {
        for (int64_t p = 0; p < taps; ++p, target += d) {
          kernels.sum_lines(terms.data(), plan_.first_term.data() + p * taps, int(taps), c * kPanel, scale,
                            lines.data());
          kernels.blend_taps(lines.data(), int(taps), channels_in(j), decay, target);
        }
      }
    }
  }

  // tiles[2 r] = sums of region r with channel rows of panel i and columns of panel j; tiles[2 r + 1]: the same of the
  // region with u and u + s exchanged.
  void orient_tiles(int64_t group, int64_t i, int64_t j, T* scratch, const T** tiles) const {
    const auto transpose_tile = [](const T* tile, T* target) {
      panel_kernels<T>().transpose_tile(tile, target, kPanel);
      return target;
    };
    for (size_t r = 0; r < plan_.regions.size(); ++r, scratch += 2 * kTile) {
      const Region& region = plan_.regions[r];
      const auto tile = [&](int64_t a, int64_t b) { return sums_.data() + layout_.tile(region, int(r), group, a, b); };
      if (region.symmetric()) {
        tiles[2 * r] = tiles[2 * r + 1] = j <= i ? tile(i, j) : transpose_tile(tile(j, i), scratch);
      } else {
        tiles[2 * r] = tile(i, j);
        tiles[2 * r + 1] = transpose_tile(tile(j, i), scratch + kTile);
      }
    }
  }

  void expand_depthwise(int64_t group, T decay, T scale, T* out) const {
    const int64_t taps = shape_.taps(), d = taps + (bias_ ? 1 : 0);
    for (int64_t p = 0; p < taps; ++p) {
      for (int64_t q = 0; q < taps; ++q) {
        T sum = 0;
        for (int64_t t = plan_.first_term[p * taps + q]; t < plan_.first_term[p * taps + q + 1]; ++t) {
          sum += sums_[layout_.lanes(plan_.terms[t].region, group / kPanel) + group % kPanel];
        }
        out[p * d + q] = blend(out[p * d + q], sum, decay, scale);
      }
    }
  }

  // The last row and column: sums of the patches themselves, and their number.
  void expand_bias(int64_t group, T decay, T scale, T* out, int64_t d) const {
    const int64_t taps = shape_.taps();
    for (int64_t c = 0; c < shape_.group_channels(); ++c) {
      const int64_t lane = source_.depthwise() ? group : group * source_.panels_per_group() * kPanel + c;
      for (int64_t p = 0; p < taps; ++p) {
        T sum = 0;
        for (int64_t t = plan_.first_term[p * taps + p]; t < plan_.first_term[p * taps + p + 1]; ++t) {
          sum += sums_[layout_.columns(plan_.terms[t].region, 0) + lane];
        }
        const int64_t row = c * taps + p;
        for (T* entry : {out + row * d + d - 1, out + (d - 1) * d + row}) *entry = blend(*entry, sum, decay, scale);
      }
    }
    const T count = T(shape_.samples * shape_.out_h * shape_.out_w);
    out[d * d - 1] = blend(out[d * d - 1], count, decay, scale);
  }

  const PanelSource<T>& source_;
  const ConvShape& shape_;
  const std::shared_ptr<const ShiftPlan> kept_plan_;
  const ShiftPlan& plan_;
  const SumLayout layout_;
  const bool bias_;
  const int threads_;
  std::vector<T> sums_;
};

// Multiply-adds from which on a blend is computed beside `out`, so that an interrupt leaves that as it was.
constexpr double kLongWork = 2e10;

double work(const ConvShape& shape) {
  const double d = double(shape.patch_size());
  return double(shape.samples) * double(shape.out_h * shape.out_w) * double(shape.groups) * d * d;
}

template <class T>
void covariance(const ImageView& image, const ConvShape& shape, CovarianceMode mode, CovarianceAlgorithm algorithm,
                bool bias, double decay, double scale, void* out, int threads) {
  const auto source = panel_source<T>(image, shape, mode, algorithm, threads);
  const auto run = [&](double past, T* target) {
    if (takes_rows(*source, threads)) return rows_covariance(*source, bias, past, scale, target, threads);
    Covariance<T>(*source, bias, threads).run(past, scale, target);
  };
  T* const target = static_cast<T*>(out);
  if (decay == 0) return run(0, target);
  if (work(shape) < kLongWork) {
    const Uninterrupted whole;
    return run(decay, target);
  }
  const int64_t d = shape.patch_size() + (bias ? 1 : 0);
  Buffer<T> fresh(elements<T>(Checked(shape.groups) * d * d));
  run(0, fresh.data());
  for (size_t i = 0; i < fresh.size(); ++i) target[i] = T(decay) * target[i] + fresh[i];
}

// Bytes from the first number of an image to beyond its last.
int64_t extent(const ImageView& image, const ConvShape& s) {
  const Checked last = Checked(s.samples - 1) * image.stride_n + Checked(s.channels - 1) * image.stride_c +
                       Checked(s.height - 1) * image.stride_h + Checked(s.width - 1) * image.stride_w;
  return ((last + 1) * element_size(image.dtype)).value();
}

}  // namespace

void covariance_cpu(const ImageView& image, const ConvShape& shape, CovarianceMode mode, CovarianceAlgorithm algorithm,
                    bool bias, double decay, double scale, void* out, int threads) {
  const ConvShape s = checked_shape(shape);
  const int64_t d = s.patch_size() + (bias ? 1 : 0), size = element_size(image.dtype) == 8 ? 8 : 4;
  check_apart("out and the input", out, (Checked(s.groups) * d * d * size).value(), image.data, extent(image, s));
  if (algorithm == CovarianceAlgorithm::kAuto) algorithm = covariance_algorithm(s);
  const auto run = image.dtype == DType::kFloat64 ? covariance<double> : covariance<float>;
  run(image, s, mode, algorithm, bias, decay, scale, out, threads);
}

}  // namespace kfac
