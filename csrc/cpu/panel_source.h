// Packs samples of a layer's input into panels: [pixels][samples][kPanel] for each panel of channels.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "kfac/covariance.h"
#include "kfac/simd.h"

namespace kfac {

constexpr int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// What is left to do once packed: `shape` is the convolution whose patches the packed channels still have to form
// (1 x 1 where packing has gathered or averaged them already). Depthwise layers pack 16 groups into a panel.
template <class T>
class PanelSource {
 public:
  PanelSource(const ImageView& image, const ConvShape& shape, const ConvShape& packed)
      : image_(image), shape_(shape), packed_(packed) {}
  virtual ~PanelSource() = default;

  const ConvShape& packed() const { return packed_; }
  bool depthwise() const { return packed_.groups > 1 && packed_.group_channels() == 1; }
  int64_t pixels() const { return packed_.height * packed_.width; }
  int64_t panels_per_group() const { return divide_up(packed_.group_channels(), int64_t(kPanel)); }
  int64_t panels() const {
    return depthwise() ? divide_up(packed_.groups, int64_t(kPanel)) : packed_.groups * panels_per_group();
  }

  // target [pixels][samples][kPanel] <- samples first, first + 1, ... of one panel
  virtual void pack(int64_t first, int64_t samples, int64_t panel, T* target) const = 0;

 protected:
  // First packed channel of a panel and how many it holds.
  std::pair<int64_t, int64_t> channels_of(int64_t panel) const {
    if (depthwise()) return {panel * kPanel, std::min<int64_t>(kPanel, packed_.groups - panel * kPanel)};
    const int64_t group = panel / panels_per_group(), start = panel % panels_per_group() * kPanel;
    return {group * packed_.group_channels() + start, std::min<int64_t>(kPanel, packed_.group_channels() - start)};
  }

  const char* pixel(int64_t n, int64_t c, int64_t y, int64_t x) const {
    const int64_t at = n * image_.stride_n + c * image_.stride_c + y * image_.stride_h + x * image_.stride_w;
    return static_cast<const char*>(image_.data) + at * element_size(image_.dtype);
  }

  const ImageView image_;
  const ConvShape shape_;
  const ConvShape packed_;
};

template <class T>
std::unique_ptr<PanelSource<T>> panel_source(const ImageView& image, const ConvShape& shape, CovarianceMode mode,
                                             CovarianceAlgorithm algorithm);

}  // namespace kfac
