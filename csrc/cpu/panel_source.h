// Packs samples of a layer's input into panels: [pixels][samples][kPanel] for each panel of channels, pixels in the
// order of a `PixelOrder`.
#pragma once

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "buffer.h"
#include "kfac/checked.h"
#include "kfac/covariance.h"
#include "kfac/simd.h"

namespace kfac {

constexpr int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Pixels whose row has the same rest by the stride, and whose column has, lie side by side as an image of their own:
// what a strided kernel position meets is then rows of neighbours, as at stride 1. Rests that no kernel position has
// are left out.
class PixelOrder {
 public:
  explicit PixelOrder(const ConvShape& shape)
      : vertical_(shape.height, shape.kernel_h, shape.stride_h, shape.pad_top, shape.dilation_h),
        horizontal_(shape.width, shape.kernel_w, shape.stride_w, shape.pad_left, shape.dilation_w) {}

  int64_t pixels() const {
    return (Checked(vertical_.phases) * vertical_.length * horizontal_.phases * horizontal_.length).value();
  }
  // Where the pixels u of a region begin in a panel of so many samples, or where their u + s do.
  int64_t start(const Region& region, int64_t samples, bool shifted = false) const {
    const int64_t y = region.y0 + (shifted ? region.shift_y : 0), x = region.x0 + (shifted ? region.shift_x : 0);
    return place(y, x) * samples * kPanel;
  }
  Runs runs(const Region& region, int64_t samples) const {
    Runs found{region.ny, horizontal_.length * samples, region.nx * samples};
    if (found.stride == found.inner) found.inner *= std::exchange(found.outer, 1);
    return found;
  }
  bool has_row(int64_t y) const { return vertical_.number_of(y) >= 0; }
  bool has_column(int64_t x) const { return horizontal_.number_of(x) >= 0; }
  // The place of a pixel whose row and column are there.
  int64_t place(int64_t y, int64_t x) const {
    const int64_t image = vertical_.number_of(y) * horizontal_.phases + horizontal_.number_of(x);
    return (image * vertical_.length + y / vertical_.stride) * horizontal_.length + x / horizontal_.stride;
  }

 private:
  struct Axis {
    Axis(int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation)
        : stride(stride), length(divide_up(size, stride)), numbers(std::min(stride, size), -1) {
      for (int64_t p = 0; p < kernel; ++p) {
        const int64_t rest = ((p * dilation - pad) % stride + stride) % stride;
        if (rest < int64_t(numbers.size()) && numbers[rest] < 0) numbers[rest] = phases++;
      }
      phases =
          std::max<int64_t>(phases, 1);  // where no kernel position meets a pixel, one image that none of them is in
    }
    int64_t number_of(int64_t pixel) const { return numbers[pixel % stride]; }

    int64_t stride, length, phases = 0;
    std::vector<int64_t> numbers;  // of each rest that a pixel has; -1: left out
  };

  Axis vertical_, horizontal_;
};

// What is left to do once packed: `shape` is the convolution whose patches the packed channels still have to form
// (1 x 1 where packing has gathered or averaged them already). Depthwise layers pack 16 groups into a panel.
template <class T>
class PanelSource {
 public:
  PanelSource(const ImageView& image, const ConvShape& shape, const ConvShape& packed)
      : image_(image), shape_(shape), packed_(packed), order_(packed) {}
  virtual ~PanelSource() = default;

  const ConvShape& packed() const { return packed_; }
  bool depthwise() const { return packed_.groups > 1 && packed_.group_channels() == 1; }
  const PixelOrder& order() const { return order_; }
  int64_t panels_per_group() const { return divide_up(packed_.group_channels(), int64_t(kPanel)); }
  int64_t panels() const {
    return depthwise() ? divide_up(packed_.groups, int64_t(kPanel)) : packed_.groups * panels_per_group();
  }

  // target [pixels][samples][kPanel] <- samples first, first + 1, ... of one panel; `scratch` [scratch_size()] may hold
  // anything
  virtual void pack(int64_t first, int64_t samples, int64_t panel, T* target, T* scratch) const = 0;
  virtual size_t scratch_size() const { return 0; }

  // Memory for so many samples of one panel, or of all.
  Checked panel_size(Checked samples) const { return samples * order_.pixels() * kPanel; }
  size_t packed_size(Checked samples) const { return elements<T>(panel_size(samples) * panels()); }

  // First packed channel of a panel and how many it holds.
  std::pair<int64_t, int64_t> channels_of(int64_t panel) const {
    if (depthwise()) return {panel * kPanel, std::min<int64_t>(kPanel, packed_.groups - panel * kPanel)};
    const int64_t group = panel / panels_per_group(), start = panel % panels_per_group() * kPanel;
    return {group * packed_.group_channels() + start, std::min<int64_t>(kPanel, packed_.group_channels() - start)};
  }

 protected:
  const char* pixel(int64_t n, int64_t c, int64_t y, int64_t x) const {
    const int64_t at = n * image_.stride_n + c * image_.stride_c + y * image_.stride_h + x * image_.stride_w;
    return static_cast<const char*>(image_.data) + at * element_size(image_.dtype);
  }

  const ImageView image_;
  const ConvShape shape_;
  const ConvShape packed_;
  const PixelOrder order_;
};

template <class T>
std::unique_ptr<PanelSource<T>> panel_source(const ImageView& image, const ConvShape& shape, CovarianceMode mode,
                                             CovarianceAlgorithm algorithm, int threads);

}  // namespace kfac
