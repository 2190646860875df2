// Runs the grouped CUDA covariance, schedule and kernel bodies, with simulated threads, and compares every entry with
// patches multiplied out in float64.
//
//   covariance_emulation [--device] [case ...]    default: all cases; prints one line a layer, ends with 1 on a failure
//
// With --device the same cases run on the GPU, twice: small enough for compute-sanitizer, and without Python.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "emulation.h"
#ifdef KFAC_WITH_CUDA
#include "covariance.h"
#endif

namespace {

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

Layer conv(std::string name, int64_t samples, int64_t channels, int64_t size, int64_t kernel, int64_t stride,
           int64_t pad, int64_t groups = 1) {
  const int64_t out = (size + 2 * pad - kernel) / stride + 1;
  return {std::move(name),
          {samples, channels, size, size, kernel, kernel, stride, stride, pad, pad, 1, 1, out, out, groups}};
}

Layer rows(std::string name, int64_t samples, int64_t features) {
  return {std::move(name), {samples, features, 1, 1}};
}

// ---- data ----------------------------------------------------------------------------------------------------------

uint16_t to_bfloat16(float value) {
  const uint32_t bits = float_bits(value);
  return uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

// The half nearest to `value` among all finite ones, through the conversion under test's inverse.
uint16_t to_half(float value) {
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

Image random_image(const Layer& layer, unsigned seed) {
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

// ---- the oracle ----------------------------------------------------------------------------------------------------

// Patches of one group as rows [N S or N][d] in float64, one pixel at a time.
std::vector<std::vector<double>> patches(const Layer& layer, const Image& image, int64_t group) {
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

std::vector<double> oracle(const Layer& layer, const Image& image) {
  const int64_t d = layer.shape.patch_size() + layer.bias;
  std::vector<double> result(layer.shape.groups * d * d, 0.0);
  for (int64_t group = 0; group < layer.shape.groups; ++group) {
    double* const matrix = result.data() + group * d * d;
    for (const std::vector<double>& row : patches(layer, image, group)) {
      for (int64_t i = 0; i < d; ++i) {
        const double value = row[i];
        if (value == 0.0) continue;
        for (int64_t j = 0; j <= i; ++j) matrix[i * d + j] += value * row[j];
      }
    }
    for (int64_t i = 0; i < d; ++i) {
      for (int64_t j = 0; j < i; ++j) matrix[j * d + i] = matrix[i * d + j];
    }
  }
  return result;
}

// ---- the kernels ---------------------------------------------------------------------------------------------------

struct Aligned {  // 16-byte aligned floats, NaN where nothing is written
  explicit Aligned(int64_t count)
      : floats(count + 4, std::numeric_limits<float>::quiet_NaN()),
        data(reinterpret_cast<float*>(align_up(reinterpret_cast<uintptr_t>(floats.data()), uintptr_t(16)))) {}
  std::vector<float> floats;
  float* data;
};

using Matrices = std::vector<std::vector<float>>;

std::vector<CovarianceProblem> problems_of(const std::vector<Layer>& layers, const std::vector<Image>& images) {
  std::vector<CovarianceProblem> problems;
  for (size_t l = 0; l < layers.size(); ++l) {
    const Layer& layer = layers[l];
    const Image& image = images[l];
    problems.push_back({layer.dtype, image.stride_n, image.stride_c, image.stride_h, image.stride_w, layer.shape,
                        layer.mode, layer.algorithm, layer.bias, layer.precision});
  }
  return problems;
}

// What decay 0 must forget, or what a running average holds.
Matrices matrices_before(const std::vector<Layer>& layers) {
  Matrices outs;
  for (const Layer& layer : layers) {
    const int64_t d = layer.shape.patch_size() + layer.bias;
    outs.emplace_back(layer.shape.groups * d * d, layer.decay == 0.0f ? std::numeric_limits<float>::quiet_NaN() : 2.0f);
  }
  return outs;
}

ExpandPointers weights_of(const std::vector<Layer>& layers) {
  ExpandPointers targets{};
  for (size_t l = 0; l < layers.size(); ++l) {
    targets.decay[l] = layers[l].decay;
    targets.scale[l] = 1.0f;
  }
  return targets;
}

Matrices emulated(const std::vector<Layer>& layers, const std::vector<Image>& images, const simulated::Schedule& how) {
  const CovarianceGroup group(problems_of(layers, images));
  Matrices outs = matrices_before(layers);
  PackPointers sources{};
  ExpandPointers targets = weights_of(layers);
  for (size_t l = 0; l < layers.size(); ++l) {
    sources.image[l] = images[l].bytes.data();
    targets.out[l] = outs[l].data();
  }
  const Aligned workspace(group.workspace_bytes() / 4);
  emulate_covariance(group, group.descriptors().data(), workspace.data, sources, targets, how);
  return outs;
}

#ifdef KFAC_WITH_CUDA
void expect(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "covariance_emulation: %s: %s\n", what, cudaGetErrorString(status));
  std::exit(3);
}

// Memory on the GPU that nothing has written, or a copy.
class DeviceMemory {
 public:
  explicit DeviceMemory(size_t bytes) { expect(cudaMalloc(&data, bytes + 1), "cudaMalloc"); }
  DeviceMemory(const void* from, size_t bytes) : DeviceMemory(bytes) {
    expect(cudaMemcpy(data, from, bytes, cudaMemcpyHostToDevice), "copy to the device");
  }
  DeviceMemory(DeviceMemory&& other) noexcept : data(std::exchange(other.data, nullptr)) {}
  ~DeviceMemory() { cudaFree(data); }
  void* data = nullptr;
};

Matrices on_device(const std::vector<Layer>& layers, const std::vector<Image>& images) {
  const CovarianceGroup group(problems_of(layers, images));
  Matrices outs = matrices_before(layers);
  PackPointers sources{};
  ExpandPointers targets = weights_of(layers);
  std::vector<DeviceMemory> inputs, results;
  for (size_t l = 0; l < layers.size(); ++l) {
    inputs.emplace_back(images[l].bytes.data(), images[l].bytes.size());
    results.emplace_back(outs[l].data(), outs[l].size() * sizeof(float));
    sources.image[l] = inputs.back().data;
    targets.out[l] = static_cast<float*>(results.back().data);
  }
  const DeviceMemory descriptors(group.descriptors().data(), group.descriptors().size());
  const DeviceMemory workspace(group.workspace_bytes());
  expect(covariance_cuda(group, descriptors.data, workspace.data, sources, targets, nullptr), "launch");
  expect(cudaDeviceSynchronize(), "kernels");
  for (size_t l = 0; l < layers.size(); ++l) {
    expect(cudaMemcpy(outs[l].data(), results[l].data, outs[l].size() * sizeof(float), cudaMemcpyDeviceToHost), "copy");
  }
  return outs;
}
#endif

// ---- checks --------------------------------------------------------------------------------------------------------

double relative_error(const Layer& layer, const std::vector<float>& value, const std::vector<double>& exact) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    const double wanted = exact[i] + double(layer.decay) * 2.0;
    error += (value[i] - wanted) * (value[i] - wanted);
    norm += wanted * wanted;
  }
  return std::sqrt(error / norm);
}

bool is_symmetric(const Layer& layer, const std::vector<float>& value) {
  const int64_t d = layer.shape.patch_size() + layer.bias;
  for (int64_t group = 0; group < layer.shape.groups; ++group) {
    const float* const matrix = value.data() + group * d * d;
    for (int64_t i = 0; i < d; ++i) {
      for (int64_t j = 0; j < i; ++j) {
        if (matrix[i * d + j] != matrix[j * d + i]) return false;
      }
    }
  }
  return true;
}

// Errors allowed: sums in float32; tf32 moves each input by up to 2^-12 of itself, which few rows do not average out.
double tolerance(const Layer& layer) {
  return layer.precision == Precision::kTf32 ? 2e-4 : 3e-7;
}

bool check(const std::string& name, const std::vector<Layer>& layers, bool device) {
  using simulated::Copies;
  using simulated::Order;
  std::vector<Image> images;
  for (size_t l = 0; l < layers.size(); ++l) images.push_back(random_image(layers[l], unsigned(l + 1)));
  Matrices values, others;
  if (device) {
#ifdef KFAC_WITH_CUDA
    values = on_device(layers, images);
    others = on_device(layers, images);
#endif
  } else {
    values = emulated(layers, images, {Order::kForward, Copies::kLate, 3});
    others = emulated(layers, images, {Order::kBackward, Copies::kEarly, 7});
  }
  bool good = true;
  for (size_t l = 0; l < layers.size(); ++l) {
    const double error = relative_error(layers[l], values[l], oracle(layers[l], images[l]));
    const bool symmetric = is_symmetric(layers[l], values[l]);
    const bool same = memcmp(values[l].data(), others[l].data(), values[l].size() * sizeof(float)) == 0;
    const bool passed = error <= tolerance(layers[l]) && symmetric && same;
    std::printf("%-9s %-34s error %.2e%s%s%s\n", name.c_str(), layers[l].name.c_str(), error,
                symmetric ? "" : " NOT SYMMETRIC", same ? "" : " DEPENDS ON THE ORDER OF THREADS",
                passed ? "" : "  FAILED");
    good = good && passed;
  }
  return good;
}

// ---- cases ---------------------------------------------------------------------------------------------------------

// The distinct A of VGG19 on 32 x 32 images (13 of 16 convolutions repeat a shape), and two G.
std::vector<Layer> vgg19() {
  std::vector<Layer> layers;
  const int64_t sizes[][3] = {{3, 32, 2},  {64, 32, 1}, {64, 16, 2}, {128, 16, 1},
                              {128, 8, 2}, {256, 8, 1}, {512, 2, 2}};
  for (const auto& [channels, size, samples] : sizes) {
    layers.push_back(conv("conv 3x3, " + std::to_string(channels) + " x " + std::to_string(size) + "^2", samples,
                          channels, size, 3, 1, 1));
  }
  layers.push_back(conv("G of 512 x 4^2", 2, 512, 4, 1, 1, 0));
  layers.push_back(rows("fc, 512", 3, 512));
  for (size_t l = 0; l < layers.size(); l += 2) layers[l].bias = true;
  return layers;
}

// Too large for a quick run with the rest: 4608 x 4608.
std::vector<Layer> vgg19_widest() {
  return {conv("conv 3x3, 512 x 4^2", 1, 512, 4, 3, 1, 1)};
}

std::vector<Layer> resnet32() {
  std::vector<Layer> layers{
      conv("conv 3x3, 3 x 32^2", 2, 3, 32, 3, 1, 1),     conv("conv 3x3, 16 x 32^2", 3, 16, 32, 3, 1, 1),
      conv("conv 3x3/2, 16 x 32^2", 2, 16, 32, 3, 2, 1), conv("conv 3x3, 32 x 16^2", 3, 32, 16, 3, 1, 1),
      conv("conv 3x3/2, 32 x 16^2", 2, 32, 16, 3, 2, 1), conv("conv 3x3, 64 x 8^2", 3, 64, 8, 3, 1, 1),
      conv("G of 16 x 32^2", 4, 16, 32, 1, 1, 0),        rows("fc, 64", 9, 64)};
  for (Layer& layer : layers) layer.bias = true;
  layers[3].layout = layers[6].layout = Layout::kChannelsLast;
  layers[5].decay = 0.75f;
  return layers;
}

std::vector<Layer> resnet50() {
  std::vector<Layer> layers{conv("conv 7x7/2, 3 x 40^2", 1, 3, 40, 7, 2, 3),
                            conv("conv 1x1, 64 x 14^2", 2, 64, 14, 1, 1, 0),
                            conv("conv 3x3, 64 x 14^2", 2, 64, 14, 3, 1, 1),
                            conv("conv 1x1, 256 x 14^2", 2, 256, 14, 1, 1, 0),
                            conv("conv 3x3/2, 128 x 14^2", 1, 128, 14, 3, 2, 1),
                            conv("conv 1x1/2, 256 x 14^2", 2, 256, 14, 1, 2, 0),
                            conv("conv 3x3, 128 x 7^2", 1, 128, 7, 3, 1, 1),
                            conv("conv 1x1, 1024 x 7^2", 1, 1024, 7, 1, 1, 0),
                            rows("fc, 2048", 2, 2048)};
  layers[2].layout = layers[5].layout = Layout::kChannelsLast;
  layers[8].bias = layers[4].bias = true;
  return layers;
}

std::vector<Layer> mlp() {
  std::vector<Layer> layers{rows("fc1, 784", 33, 784), rows("fc2, 1024", 16, 1024), rows("G, 10", 64, 10),
                            rows("many rows, 40", 5000, 40), rows("wide batch, 130", 2100, 130)};
  layers[0].bias = layers[3].bias = true;
  layers[4].decay = 0.5f;
  return layers;
}

// Dtypes, precisions, groups, reduce, odd sizes.
std::vector<Layer> kinds() {
  std::vector<Layer> layers;
  const auto with = [&](Layer layer, const std::function<void(Layer&)>& change) {
    change(layer);
    layers.push_back(layer);
  };
  const auto reduce = [](Layer& layer) { layer.mode = CovarianceMode::kReduce; };
  with(conv("bf16, 17 x 9^2", 3, 17, 9, 3, 1, 1), [](Layer& l) { l.dtype = DType::kBFloat16; });
  with(conv("fp16, 33 x 6^2", 3, 33, 6, 3, 1, 1), [](Layer& l) { l.dtype = DType::kFloat16; });
  with(conv("fp16 reduce, 33 x 6^2", 3, 33, 6, 3, 1, 1), [&](Layer& l) { l.dtype = DType::kFloat16, reduce(l); });
  with(conv("tf32, 70 x 7^2", 4, 70, 7, 3, 1, 1), [](Layer& l) { l.precision = Precision::kTf32, l.bias = true; });
  with(rows("tf32, 129", 300, 129), [](Layer& l) { l.precision = Precision::kTf32; });
  with(conv("depthwise, 37 x 8^2", 3, 37, 8, 3, 1, 1, 37), [](Layer& l) { l.bias = true, l.decay = 0.25f; });
  with(conv("depthwise/2, 20 x 7^2", 2, 20, 7, 3, 2, 1, 20), [](Layer& l) { l.precision = Precision::kTf32; });
  with(conv("grouped 8, 24 x 6^2", 2, 24, 6, 3, 1, 1, 8), [](Layer& l) { l.bias = true; });
  with(conv("grouped 2, 24 x 6^2", 2, 24, 6, 3, 1, 1, 2), [](Layer& l) { l.bias = true; });
  with(conv("grouped 2 as patches", 2, 24, 6, 3, 1, 1, 2),
       [](Layer& l) { l.algorithm = CovarianceAlgorithm::kPatches; });
  with(conv("reduce, 20 x 9^2", 5, 20, 9, 3, 2, 1), [&](Layer& l) { reduce(l), l.bias = true; });
  with(conv("reduce grouped 4, 12 x 5^2", 5, 12, 5, 3, 1, 1, 4), [&](Layer& l) { reduce(l), l.bias = true; });
  with(conv("reduce depthwise, 12 x 5^2", 5, 12, 5, 3, 1, 1, 12), reduce);
  with(conv("one pixel, 16 x 1^2", 3, 16, 1, 3, 1, 1), [](Layer& l) { l.bias = true; });
  with(conv("smaller than the kernel, 9 x 2^2", 3, 9, 2, 5, 1, 2), [](Layer&) {});
  with(conv("one channel, 1 x 9^2", 2, 1, 9, 3, 1, 1), [](Layer& l) { l.bias = true; });
  with(conv("4x4 kernel, 12 x 9^2", 2, 12, 9, 4, 1, 1), [](Layer& l) { l.layout = Layout::kChannelsLast; });
  with(conv("stride 3, 16 x 10^2", 2, 16, 10, 3, 3, 2), [](Layer&) {});
  with(rows("one row, one feature", 1, 1), [](Layer& l) { l.bias = true; });
  with(rows("31", 65, 31), [](Layer&) {});
  with(rows("33", 65, 33), [](Layer& l) { l.bias = true; });
  Layer dilated{"dilation 2, 16 x 11 x 9", {2, 16, 11, 9, 3, 3, 1, 2, 2, 2, 2, 2, 11, 5, 1}};
  layers.push_back(dilated);
  Layer untouched{"padding only, 8 x 1^2", {2, 8, 1, 1, 1, 1, 3, 3, 1, 1, 1, 1, 1, 1, 1}};
  untouched.decay = 1.0f;
  layers.push_back(untouched);
  return layers;
}

}  // namespace

int main(int count, char** names) {
  const std::map<std::string, std::vector<Layer> (*)()> cases{{"kinds", kinds},       {"mlp", mlp},
                                                              {"resnet32", resnet32}, {"resnet50", resnet50},
                                                              {"vgg19", vgg19},       {"vgg19_512", vgg19_widest}};
  bool device = false, good = true;
  std::vector<std::string> chosen;
  for (int i = 1; i < count; ++i) {
    if (std::string(names[i]) == "--device") {
      device = true;
    } else {
      chosen.push_back(names[i]);
    }
  }
#ifndef KFAC_WITH_CUDA
  if (device) {
    std::fprintf(stderr, "covariance_emulation: built without CUDA\n");
    return 2;
  }
#endif
  if (chosen.empty()) {
    for (const auto& entry : cases) chosen.push_back(entry.first);
  }
  for (const std::string& name : chosen) {
    if (!cases.count(name)) {
      std::fprintf(stderr, "covariance_emulation: no case %s\n", name.c_str());
      return 2;
    }
    good = check(name, cases.at(name)(), device) && good;
  }
  return good ? 0 : 1;
}
