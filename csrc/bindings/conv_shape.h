// A convolution's geometry and an image as Python passes them.
#pragma once

#include <array>

#include "kfac/covariance.h"

// samples, channels, height, width, kernel, stride, padding (top, left), dilation, output size, groups
using ConvShapeNumbers = std::array<int64_t, 15>;

inline kfac::ConvShape conv_shape(const ConvShapeNumbers& v) {
  return {v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11], v[12], v[13], v[14]};
}

// strides: of [N, C, H, W]
inline kfac::ImageView image_view(uintptr_t data, int dtype, const std::array<int64_t, 4>& strides) {
  return {reinterpret_cast<const void*>(data),
          static_cast<kfac::DType>(dtype),
          strides[0],
          strides[1],
          strides[2],
          strides[3]};
}
