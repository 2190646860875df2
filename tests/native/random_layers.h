// Random inputs of layers and their patches in float64: what the emulations of covariances begin with.
#pragma once

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "kfac/covariance_group.h"

namespace layers {

using namespace kfac;

enum class Layout { kContiguous, kChannelsLast };

struct Layer {
  std::string name;
  ConvShape shape;
  CovarianceMode mode = CovarianceMode::kExpand;
  bool bias = false;
  DType dtype = DType::kFloat32;
  Precision precision = Precision::kFloat32;
  Layout layout = Layout::kContiguous;
  CovarianceAlgorithm algorithm = CovarianceAlgorithm::kAuto;
  float decay = 0.0f;
};

inline Layer conv(std::string name, int64_t samples, int64_t channels, int64_t size, int64_t kernel, int64_t stride,
                  int64_t pad, int64_t groups = 1) {
  const int64_t out = (size + 2 * pad - kernel) / stride + 1;
  return {std::move(name),
          {samples, channels, size, size, kernel, kernel, stride, stride, pad, pad, 1, 1, out, out, groups}};
}

inline Layer rows(std::string name, int64_t samples, int64_t features) {
  return {std::move(name), {samples, features, 1, 1}};
}

inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = float_bits(value);
  return uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

// The half nearest to `value` among all finite ones, through the conversion under test's inverse.
inline uint16_t to_half(float value) {
  const float magnitude = std::fabs(value);
  const int exponent = std::max(-14, magnitude > 0 ? std::ilogb(magnitude) : -14);
  const int mantissa = int(std::lrint(std::ldexp(magnitude, 10 - exponent)));
  return uint16_t((value < 0 ? 0x8000 : 0) + ((exponent + 14) << 10) + mantissa);
}

struct Image {
  std::vector<char> bytes;
  std::vector<double> values;  // [N, C, H, W], what the bytes hold
  int64_t stride_n, stride_c, stride_h, stride_w;
};

inline Image random_image(const Layer& layer, unsigned seed) {
  const ConvShape& s = layer.shape;
  Image image;
  const bool last = layer.layout == Layout::kChannelsLast;
  image.stride_n = s.channels * s.height * s.width;
  image.stride_c = last ? 1 : s.height * s.width;
  image.stride_h = last ? s.width * s.channels : s.width;
  image.stride_w = last ? s.channels : 1;
  const int64_t count = s.samples * image.stride_n;
  const int64_t size = layer.dtype == DType::kFloat32 ? 4 : 2;
  image.bytes.resize(count * size);
  image.values.resize(count);
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.5f, 1.0f);
  for (int64_t n = 0, i = 0; n < s.samples; ++n) {
    for (int64_t c = 0; c < s.channels; ++c) {
      for (int64_t y = 0; y < s.height; ++y) {
        for (int64_t x = 0; x < s.width; ++x, ++i) {
          float value = normal(random);
          const int64_t at = n * image.stride_n + c * image.stride_c + y * image.stride_h + x * image.stride_w;
          if (layer.dtype == DType::kFloat32) {
            memcpy(image.bytes.data() + at * size, &value, size);
          } else {
            const bool half = layer.dtype == DType::kFloat16;
            const uint16_t bits = half ? to_half(value) : to_bfloat16(value);
            memcpy(image.bytes.data() + at * size, &bits, size);
            const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
            value = !half ? bits_float(uint32_t(bits) << 16)
                          : (bits >> 15 ? -1.0f : 1.0f) * (exponent ? std::ldexp(1024.0f + mantissa, exponent - 25)
                                                                    : std::ldexp(float(mantissa), -24));
          }
          image.values[i] = value;
        }
      }
    }
  }
  return image;
}

// Patches of one group as rows [N S or N][d] in float64, one pixel at a time.
inline std::vector<std::vector<double>> patches(const Layer& layer, const Image& image, int64_t group) {
  const ConvShape& s = layer.shape;
  const int64_t channels = s.group_channels(), d = s.patch_size() + layer.bias;
  std::vector<std::vector<double>> result;
  for (int64_t n = 0; n < s.samples; ++n) {
    std::vector<double> mean(d, 0.0);
    for (int64_t oy = 0; oy < s.out_h; ++oy) {
      for (int64_t ox = 0; ox < s.out_w; ++ox) {
        std::vector<double> patch(d, 1.0);
        for (int64_t entry = 0; entry < s.patch_size(); ++entry) {
          const int64_t c = group * channels + entry / s.taps(), tap = entry % s.taps();
          const int64_t y = oy * s.stride_h + tap / s.kernel_w * s.dilation_h - s.pad_top;
          const int64_t x = ox * s.stride_w + tap % s.kernel_w * s.dilation_w - s.pad_left;
          const bool inside = y >= 0 && y < s.height && x >= 0 && x < s.width;
          patch[entry] = inside ? image.values[((n * s.channels + c) * s.height + y) * s.width + x] : 0.0;
        }
        if (layer.mode == CovarianceMode::kExpand) result.push_back(patch);
        for (int64_t i = 0; i < d; ++i) mean[i] += patch[i] / double(s.out_h * s.out_w);
      }
    }
    if (layer.mode == CovarianceMode::kReduce) result.push_back(mean);
  }
  return result;
}

inline CovarianceProblem problem_of(const Layer& layer, const Image& image) {
  return {layer.dtype, image.stride_n, image.stride_c,  image.stride_h, image.stride_w,
          layer.shape, layer.mode,     layer.algorithm, layer.bias,     layer.precision};
}

}  // namespace layers
