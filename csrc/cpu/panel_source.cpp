#include "panel_source.h"

#include <utility>

namespace kfac {
namespace {

// The image as it is: patches are formed by shifting the packed panels.
template <class T>
class ImageSource final : public PanelSource<T> {
 public:
  ImageSource(const ImageView& image, const ConvShape& shape) : PanelSource<T>(image, shape, shape) {}

  void pack(int64_t first, int64_t samples, int64_t panel, T* target) const override {
    const auto [channel, channels] = this->channels_of(panel);
    const ConvShape& s = this->shape_;
    const ImageView& v = this->image_;
    const void* sources[kPanel] = {};
    const auto point = [&](int64_t n, int64_t y) {
      for (int64_t i = 0; i < channels; ++i) sources[i] = this->pixel(n, channel + i, y, 0);
    };
    const auto interleave = panel_kernels<T>().interleave;
    if (s.height * s.width == 1) {
      point(first, 0);
      return interleave(sources, v.dtype, samples, v.stride_n, target, kPanel);
    }
    const bool one_run = v.stride_h == v.stride_w * s.width;
    const int64_t runs = one_run ? 1 : s.height, length = one_run ? s.height * s.width : s.width;
    for (int64_t n = 0; n < samples; ++n) {
      for (int64_t y = 0; y < runs; ++y) {
        point(first + n, y);
        interleave(sources, v.dtype, length, v.stride_w, target + (y * length * samples + n) * kPanel,
                   samples * kPanel);
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

// Base of the sources that look at zero-padded images, one channel at a time.
template <class T>
class PaddedSource : public PanelSource<T> {
 protected:
  PaddedSource(const ImageView& image, const ConvShape& shape, const ConvShape& packed)
      : PanelSource<T>(image, shape, packed),
        rows_((shape.out_h - 1) * shape.stride_h + (shape.kernel_h - 1) * shape.dilation_h + 1),
        columns_((shape.out_w - 1) * shape.stride_w + (shape.kernel_w - 1) * shape.dilation_w + 1) {}

  // plane [rows_][columns_] <- all that the kernel meets of one channel of one sample
  void pad(int64_t n, int64_t channel, T* plane) const {
    const ConvShape& s = this->shape_;
    const int64_t count = std::min(s.width, columns_ - s.pad_left);
    std::fill_n(plane, rows_ * columns_, T(0));
    for (int64_t y = 0; y < std::min(s.height, rows_ - s.pad_top); ++y) {
      panel_kernels<T>().convert(this->pixel(n, channel, y, 0), this->image_.dtype, count, this->image_.stride_w,
                                 plane + (y + s.pad_top) * columns_ + s.pad_left);
    }
  }

  const int64_t rows_, columns_;
};

// Patches gathered pixel by pixel: for few channels, where shifting would mostly multiply padding.
template <class T>
class PatchSource final : public PaddedSource<T> {
 public:
  PatchSource(const ImageView& image, const ConvShape& shape)
      : PaddedSource<T>(image, shape, patches_as_channels(shape, shape.out_h, shape.out_w)) {}

  void pack(int64_t first, int64_t samples, int64_t panel, T* target) const override {
    const auto [entry, entries] = this->channels_of(panel);
    const ConvShape& s = this->shape_;
    const int64_t taps = s.taps(), channel = entry / taps, channels = (entry + entries - 1) / taps - channel + 1;
    const int64_t plane = this->rows_ * this->columns_;
    std::vector<T> planes(channels * plane);
    const void* sources[kPanel] = {};
    for (int64_t n = 0; n < samples; ++n) {
      for (int64_t c = 0; c < channels; ++c) this->pad(first + n, channel + c, planes.data() + c * plane);
      for (int64_t y = 0; y < s.out_h; ++y) {
        for (int64_t i = 0; i < entries; ++i) {
          const int64_t tap = (entry + i) % taps, row = y * s.stride_h + tap / s.kernel_w * s.dilation_h;
          sources[i] = planes.data() + ((entry + i) / taps - channel) * plane + row * this->columns_ +
                       tap % s.kernel_w * s.dilation_w;
        }
        constexpr DType kType = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;
        panel_kernels<T>().interleave(sources, kType, s.out_w, s.stride_w,
                                      target + (y * s.out_w * samples + n) * kPanel, samples * kPanel);
      }
    }
  }
};

// Patches averaged over positions: one row a sample.
template <class T>
class MeanPatchSource final : public PaddedSource<T> {
 public:
  MeanPatchSource(const ImageView& image, const ConvShape& shape)
      : PaddedSource<T>(image, shape, patches_as_channels(shape, 1, 1)) {}

  void pack(int64_t first, int64_t samples, int64_t panel, T* target) const override {
    const auto [entry, entries] = this->channels_of(panel);
    const int64_t taps = this->shape_.taps();
    std::vector<T> plane(this->rows_ * this->columns_), means(taps), row(this->columns_);
    std::fill_n(target, samples * kPanel, T(0));
    for (int64_t n = 0; n < samples; ++n) {
      for (int64_t c = entry / taps; c * taps < entry + entries; ++c) {
        this->pad(first + n, c, plane.data());
        tap_means(plane.data(), row, means.data());
        for (int64_t tap = 0; tap < taps; ++tap) {
          const int64_t i = c * taps + tap - entry;
          if (i >= 0 && i < entries) target[n * kPanel + i] = means[tap];
        }
      }
    }
  }

 private:
  // means[(ky, kx)] = mean over positions (y, x) of plane[y stride + ky dilation][x stride + kx dilation]
  void tap_means(const T* plane, std::vector<T>& row, T* means) const {
    const ConvShape& s = this->shape_;
    const T positions = T(s.out_h * s.out_w);
    for (int64_t ky = 0; ky < s.kernel_h; ++ky) {
      std::fill(row.begin(), row.end(), T(0));
      for (int64_t y = 0; y < s.out_h; ++y) {
        const T* line = plane + (y * s.stride_h + ky * s.dilation_h) * this->columns_;
        for (int64_t x = 0; x < this->columns_; ++x) row[x] += line[x];
      }
      for (int64_t kx = 0; kx < s.kernel_w; ++kx) {
        T sum = 0;
        for (int64_t x = 0; x < s.out_w; ++x) sum += row[x * s.stride_w + kx * s.dilation_w];
        means[ky * s.kernel_w + kx] = sum / positions;
      }
    }
  }
};

}  // namespace

template <class T>
std::unique_ptr<PanelSource<T>> panel_source(const ImageView& image, const ConvShape& shape, CovarianceMode mode,
                                             CovarianceAlgorithm algorithm) {
  if (mode == CovarianceMode::kReduce) return std::make_unique<MeanPatchSource<T>>(image, shape);
  if (algorithm == CovarianceAlgorithm::kPatches) return std::make_unique<PatchSource<T>>(image, shape);
  return std::make_unique<ImageSource<T>>(image, shape);
}

template std::unique_ptr<PanelSource<float>> panel_source(const ImageView&, const ConvShape&, CovarianceMode,
                                                          CovarianceAlgorithm);
template std::unique_ptr<PanelSource<double>> panel_source(const ImageView&, const ConvShape&, CovarianceMode,
                                                           CovarianceAlgorithm);

}  // namespace kfac
