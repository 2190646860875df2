#include "panel_source.h"

#include <cstring>

#include "kfac/parallel.h"

namespace kfac {
namespace {

template <class T>
constexpr DType kType = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;

// The image as it is: patches are formed by shifting the packed panels.
template <class T>
class ImageSource final : public PanelSource<T> {
 public:
  ImageSource(const ImageView& image, const ConvShape& shape) : PanelSource<T>(image, shape, shape) {}

  // A row of the image, where a stride takes it apart.
  size_t scratch_size() const override {
    const ConvShape& s = this->shape_;
    return s.stride_h == 1 && s.stride_w == 1 ? 0 : elements<T>(Checked(s.width) * kPanel);
  }

  void pack(int64_t first, int64_t samples, int64_t panel, T* target, T* scratch) const override {
    const auto [channel, channels] = this->channels_of(panel);
    const ConvShape& s = this->shape_;
    const ImageView& v = this->image_;
    const void* sources[kPanel] = {};
    const auto point = [&](int64_t n, int64_t y) {
      for (int64_t i = 0; i < channels; ++i) sources[i] = this->pixel(n, channel + i, y, 0);
    };
    const auto interleave = panel_kernels<T>().interleave;
    if (s.height * s.width == 1 && this->order().pixels() == 1) {
      point(first, 0);
      return interleave(sources, v.dtype, samples, v.stride_n, target, kPanel);
    }
    if (s.stride_h == 1 && s.stride_w == 1) {
      const bool one_run = v.stride_h == v.stride_w * s.width;
      const int64_t runs = one_run ? 1 : s.height, length = one_run ? s.height * s.width : s.width;
      for (int64_t n = 0; n < samples; ++n) {
        for (int64_t y = 0; y < runs; ++y) {
          point(first + n, y);
          interleave(sources, v.dtype, length, v.stride_w, target + (y * length * samples + n) * kPanel,
                     samples * kPanel);
        }
      }
      return;
    }
    const PixelOrder& order = this->order();
    for (int64_t n = 0; n < samples; ++n) {
      for (int64_t y = 0; y < s.height; ++y) {
        if (!order.has_row(y)) continue;
        point(first + n, y);
        interleave(sources, v.dtype, s.width, v.stride_w, scratch, kPanel);
        for (int64_t rest = 0; rest < std::min(s.stride_w, s.width); ++rest) {
          if (!order.has_column(rest)) continue;
          T* pixel = target + (order.place(y, rest) * samples + n) * kPanel;
          for (int64_t x = rest; x < s.width; x += s.stride_w, pixel += samples * kPanel) {
            std::memcpy(pixel, scratch + x * kPanel, kPanel * sizeof(T));
          }
        }
      }
    }
  }
};

ConvShape patches_as_channels(const ConvShape& shape, int64_t height, int64_t width) {
  ConvShape packed;
  packed.samples = shape.samples;
  packed.channels = shape.groups * shape.patch_size();
  packed.height = packed.out_h = height;
  packed.width = packed.out_w = width;
  packed.groups = shape.groups;
  return packed;
}

// Patches gathered pixel by pixel: for few channels, where shifting would mostly multiply padding.
template <class T>
class PatchSource final : public PanelSource<T> {
 public:
  PatchSource(const ImageView& image, const ConvShape& shape)
      : PanelSource<T>(image, shape, patches_as_channels(shape, shape.out_h, shape.out_w)),
        rows_((shape.out_h - 1) * shape.stride_h + (shape.kernel_h - 1) * shape.dilation_h + 1),
        phase_(((shape.out_w - 1) * shape.stride_w + (shape.kernel_w - 1) * shape.dilation_w) / shape.stride_w + 1),
        line_(phase_ * shape.stride_w) {}

  // Planes of the channels that a panel can have patches of, and a row of the image.
  size_t scratch_size() const override {
    const ConvShape& s = this->shape_;
    const int64_t channels = std::min<int64_t>(s.channels, (kPanel - 2) / s.taps() + 2);
    return elements<T>(Checked(rows_) * line_ * channels + s.width);
  }

  void pack(int64_t first, int64_t samples, int64_t panel, T* target, T* scratch) const override {
    const auto [entry, entries] = this->channels_of(panel);
    const ConvShape& s = this->shape_;
    const int64_t taps = s.taps(), channel = entry / taps, channels = (entry + entries - 1) / taps - channel + 1;
    const int64_t plane = rows_ * line_;
    T* const row = scratch + channels * plane;
    const T* taps_at[kPanel];  // in output row 0
    for (int64_t i = 0; i < entries; ++i) {
      taps_at[i] = scratch + ((entry + i) / taps - channel) * plane + tap_start((entry + i) % taps);
    }
    const void* sources[kPanel] = {};
    for (int64_t n = 0; n < samples; ++n) {
      for (int64_t c = 0; c < channels; ++c) pad(first + n, channel + c, scratch + c * plane, row);
      for (int64_t y = 0; y < s.out_h; ++y) {
        for (int64_t i = 0; i < entries; ++i) sources[i] = taps_at[i] + y * s.stride_h * line_;
        panel_kernels<T>().interleave(sources, kType<T>, s.out_w, 1, target + (y * s.out_w * samples + n) * kPanel,
                                      samples * kPanel);
      }
    }
  }

 private:
  // plane [rows_][stride_w][phase_] <- all that the kernel meets of one channel of one sample; columns with the same
  // rest by the stride are neighbours
  void pad(int64_t n, int64_t channel, T* plane, T* row) const {
    const ConvShape& s = this->shape_;
    const int64_t step = s.stride_w, width = std::max<int64_t>(0, std::min(s.width, line_ - s.pad_left));
    std::fill_n(plane, rows_ * line_, T(0));
    for (int64_t y = 0; y < std::min(s.height, rows_ - s.pad_top); ++y) {
      T* line = plane + (y + s.pad_top) * line_;
      panel_kernels<T>().convert(this->pixel(n, channel, y, 0), this->image_.dtype, width, this->image_.stride_w, row);
      for (int64_t first = 0; first < std::min(step, width); ++first) {
        T* target = line + place(first + s.pad_left);
        for (int64_t x = first; x < width; x += step) *target++ = row[x];
      }
    }
  }

  // Of a column of the padded image in a line of the plane.
  int64_t place(int64_t column) const {
    return column % this->shape_.stride_w * phase_ + column / this->shape_.stride_w;
  }

  // Where in the plane the tap meets the first pixel of output row 0; those of the next outputs follow.
  int64_t tap_start(int64_t tap) const {
    const ConvShape& s = this->shape_;
    return tap / s.kernel_w * s.dilation_h * line_ + place(tap % s.kernel_w * s.dilation_w);
  }

  const int64_t rows_, phase_, line_;
};

// Patches averaged over positions: one row a sample.
template <class T>
class MeanPatchSource final : public PanelSource<T> {
 public:
  MeanPatchSource(const ImageView& image, const ConvShape& shape, int threads)
      : PanelSource<T>(image, shape, patches_as_channels(shape, 1, 1)),
        row_(shape.groups * shape.patch_size()),
        means_(elements<T>(Checked(shape.samples) * row_)) {
    const ImageSource<T> pixels(image, shape);
    const Windows windows(shape);
    const size_t packed = elements<T>(pixels.panel_size(1)), scratch = pixels.scratch_size();
    const size_t sums = elements<T>(Checked(int64_t(windows.regions.size())) * kPanel);
    const int workers = int(std::min<int64_t>(threads, shape.samples));
    Buffer<T> memory(elements<T>((Checked(int64_t(packed)) + int64_t(scratch) + int64_t(sums)) * workers));
    parallel_for(shape.samples, workers, [&](int64_t n, int worker) {
      T* const own = memory.data() + worker * (packed + scratch + sums);
      average(pixels, windows, n, own, own + packed, own + packed + scratch, means_.data() + n * row_);
    });
  }

  void pack(int64_t first, int64_t samples, int64_t panel, T* target, T*) const override {
    const auto [entry, entries] = this->channels_of(panel);
    const void* sources[kPanel] = {};
    for (int64_t i = 0; i < entries; ++i) sources[i] = means_.data() + first * row_ + entry + i;
    panel_kernels<T>().interleave(sources, kType<T>, samples, row_, target, kPanel);
  }

 private:
  // Regions of pixels whose sums make up what each kernel position meets: those that its block with itself sums in the
  // plan, or if that is too large each position's own.
  struct Windows {
    explicit Windows(const ConvShape& shape) {
      const int64_t taps = shape.taps();
      if (!has_small_plan(shape)) {
        regions = tap_windows(shape);
        for (int64_t tap = 0; tap <= taps; ++tap) first.push_back(tap);
        for (int64_t tap = 0; tap < taps; ++tap) numbers.push_back(tap);
        return;
      }
      const std::shared_ptr<const ShiftPlan> plan = shift_plan(shape);
      regions = plan->regions;
      for (int64_t tap = 0; tap < taps; ++tap) {
        first.push_back(int64_t(numbers.size()));
        const int64_t block = tap * taps + tap;
        for (int64_t t = plan->first_term[block]; t < plan->first_term[block + 1]; ++t) {
          numbers.push_back(plan->terms[t].region);
        }
      }
      first.push_back(int64_t(numbers.size()));
    }

    std::vector<Region> regions;
    std::vector<int64_t> numbers, first;  // position `tap` meets regions numbers[first[tap]] up to first[tap + 1]
  };

  // means [row_] of sample n
  void average(const ImageSource<T>& pixels, const Windows& windows, int64_t n, T* packed, T* scratch, T* sums,
               T* means) const {
    const PixelOrder& order = pixels.order();
    const int64_t taps = this->shape_.taps();
    const T positions = T(this->shape_.out_h * this->shape_.out_w);
    for (int64_t panel = 0; panel < pixels.panels(); ++panel) {
      check_interrupt();
      const auto [channel, channels] = pixels.channels_of(panel);
      pixels.pack(n, 1, panel, packed, scratch);
      std::fill_n(sums, windows.regions.size() * kPanel, T(0));
      for (size_t r = 0; r < windows.regions.size(); ++r) {
        const Region& region = windows.regions[r];
        if (!region.symmetric() || region.ny * region.nx == 0) continue;
        panel_kernels<T>().column_sums(order.runs(region, 1), packed + order.start(region, 1), sums + r * kPanel);
      }
      for (int64_t tap = 0; tap < taps; ++tap) {
        for (int64_t c = 0; c < channels; ++c) {
          T sum = 0;
          for (int64_t k = windows.first[tap]; k < windows.first[tap + 1]; ++k) {
            sum += sums[windows.numbers[k] * kPanel + c];
          }
          means[(channel + c) * taps + tap] = sum / positions;
        }
      }
    }
  }

  const int64_t row_;
  Buffer<T> means_;  // [samples][row_]
};

}  // namespace

template <class T>
std::unique_ptr<PanelSource<T>> panel_source(const ImageView& image, const ConvShape& shape, CovarianceMode mode,
                                             CovarianceAlgorithm algorithm, int threads) {
  if (mode == CovarianceMode::kReduce) return std::make_unique<MeanPatchSource<T>>(image, shape, threads);
  if (algorithm == CovarianceAlgorithm::kPatches) return std::make_unique<PatchSource<T>>(image, shape);
  return std::make_unique<ImageSource<T>>(image, shape);
}

template std::unique_ptr<PanelSource<float>> panel_source(const ImageView&, const ConvShape&, CovarianceMode,
                                                          CovarianceAlgorithm, int);
template std::unique_ptr<PanelSource<double>> panel_source(const ImageView&, const ConvShape&, CovarianceMode,
                                                           CovarianceAlgorithm, int);

}  // namespace kfac
