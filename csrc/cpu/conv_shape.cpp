// Which convolutions kernels take.
#include "kfac/checked.h"
#include "kfac/covariance.h"

namespace kfac {
namespace {

void check_axis(const char* what, int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation,
                int64_t out) {
  const std::string axis = std::string(" (") + what + ")";
  const auto check = [&](const char* name, int64_t value, int64_t least) {
    check_range((name + axis).c_str(), value, least, kMaxExtent);
  };
  check("size", size, 1);
  check("kernel_size", kernel, 1);
  check("stride", stride, 1);
  check("padding", pad, 0);
  check("dilation", dilation, 1);
  check("output size", out, 1);
  check_product(("the pixels that dilation leads to" + axis).c_str(), {kernel, dilation}, kMaxExtent);
  check_product(("the pixels that stride leads to" + axis).c_str(), {out, stride}, kMaxExtent);
}

}  // namespace

ConvShape checked_shape(const ConvShape& shape) {
  ConvShape s = shape;
  if (s.out_h == 1) s.stride_h = 1;
  if (s.out_w == 1) s.stride_w = 1;
  if (s.kernel_h == 1) s.dilation_h = 1;
  if (s.kernel_w == 1) s.dilation_w = 1;
  check_range("samples", s.samples, 1, kMaxCount);
  check_range("channels", s.channels, 1, kMaxExtent);
  check_axis("vertical", s.height, s.kernel_h, s.stride_h, s.pad_top, s.dilation_h, s.out_h);
  check_axis("horizontal", s.width, s.kernel_w, s.stride_w, s.pad_left, s.dilation_w, s.out_w);
  check_range("groups", s.groups, 1, s.channels);
  if (s.channels % s.groups) throw std::invalid_argument("groups do not divide the channels");
  check_product("numbers of the input", {s.samples, s.channels, s.height, s.width}, kMaxCount);
  check_product("positions of all samples", {s.samples, s.out_h, s.out_w}, kMaxCount);
  check_product("entries of a patch", {s.group_channels(), s.kernel_h, s.kernel_w}, kMaxRows - 1);
  check_product("entries of the patches of all groups", {s.channels, s.kernel_h, s.kernel_w}, kMaxExtent);
  return s;
}

}  // namespace kfac
