// Runs the grouped CUDA covariance, schedule and kernel bodies, with simulated threads, and compares every entry with
// patches multiplied out in float64.
//
//   covariance_emulation [--device] [case ...]    default: all cases; prints one line a layer, ends with 1 on a failure
//
// With --device the same cases run on the GPU, twice: small enough for compute-sanitizer, and without Python.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "emulation.h"
#include "program.h"
#include "random_layers.h"
#ifdef KFAC_WITH_CUDA
#include "covariance.h"
#endif

namespace {

using namespace kfac;

using namespace layers;

// ---- the oracle ----------------------------------------------------------------------------------------------------

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

using Matrices = std::vector<std::vector<float>>;

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

Matrices compute(const std::vector<Layer>& layers, const std::vector<Image>& images, const simulated::Schedule& how,
                 int64_t least_wide_tiles = kLeastWideTiles) {
  std::vector<CovarianceProblem> problems;
  for (size_t l = 0; l < layers.size(); ++l) problems.push_back(problem_of(layers[l], images[l]));
  const CovarianceGroup group(problems, least_wide_tiles);
  Matrices outs = matrices_before(layers);
  program::Arrays arrays;
  PackPointers sources{};
  ExpandPointers targets = weights_of(layers);
  for (size_t l = 0; l < layers.size(); ++l) {
    sources.image[l] = arrays.input(images[l].bytes);
    targets.out[l] = arrays.output(outs[l]);
  }
  const void* const descriptors = arrays.input(group.descriptors());
  float* const workspace = static_cast<float*>(arrays.scratch(group.workspace_bytes()));
  if (program::on_gpu) {
    LAUNCH_ON_GPU(covariance_cuda(group, descriptors, workspace, sources, targets, nullptr));
  } else {
    emulate_covariance(group, descriptors, workspace, sources, targets, how);
  }
  arrays.fetch();
  return outs;
}

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

// Errors allowed: sums in float32; tf32 moves each input by up to 2^-12 of itself, which few rows do not average out,
// but no half.
double tolerance(const Layer& layer) {
  const bool halves = layer.dtype != DType::kFloat32 && layer.mode == CovarianceMode::kExpand;
  return layer.precision == Precision::kTf32 && !halves ? 2e-4 : 3e-7;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

bool check(const std::string& name, const std::vector<Layer>& layers) {
  using simulated::Copies;
  using simulated::Order;
  std::vector<Image> images;
  for (size_t l = 0; l < layers.size(); ++l) images.push_back(random_image(layers[l], unsigned(l + 1)));
  const Matrices values = compute(layers, images, {Order::kForward, Copies::kLate, 3});
  const Matrices others = compute(layers, images, {Order::kBackward, Copies::kEarly, 7});
  bool good = true;
  for (size_t l = 0; l < layers.size(); ++l) {
    const double error = relative_error(layers[l], values[l], oracle(layers[l], images[l]));
    const bool symmetric = is_symmetric(layers[l], values[l]);
    const bool same = same_bits(values[l], others[l]);
    const bool passed = error <= tolerance(layers[l]) && symmetric && same;
    std::printf("%-9s %-34s error %.2e%s%s%s\n", name.c_str(), layers[l].name.c_str(), error,
                symmetric ? "" : " NOT SYMMETRIC", same ? "" : " DEPENDS ON THE ORDER OF THREADS",
                passed ? "" : "  FAILED");
    good = good && passed;
  }
  return good;
}

// Every product that has two squares by wide tiles: the bits of squares, whatever the order of threads.
bool check_wide(const std::vector<Layer>& layers) {
  using simulated::Copies;
  using simulated::Order;
  std::vector<Image> images;
  for (size_t l = 0; l < layers.size(); ++l) images.push_back(random_image(layers[l], unsigned(l + 1)));
  const Matrices squares = compute(layers, images, {Order::kForward, Copies::kLate, 3});
  const Matrices late = compute(layers, images, {Order::kForward, Copies::kLate, 3}, 0);
  const Matrices early = compute(layers, images, {Order::kBackward, Copies::kEarly, 7}, 0);
  bool good = true;
  for (size_t l = 0; l < layers.size(); ++l) {
    const double error = relative_error(layers[l], squares[l], oracle(layers[l], images[l]));
    const bool same = same_bits(squares[l], late[l]) && same_bits(squares[l], early[l]);
    const bool passed = error <= tolerance(layers[l]) && same;
    std::printf("wide      %-34s error %.2e%s%s\n", layers[l].name.c_str(), error, same ? "" : " OTHER THAN SQUARES",
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
  const auto halves = [](Layer& l, DType dtype, Precision precision) { l.dtype = dtype, l.precision = precision; };
  with(conv("bf16 under tf32, 70 x 7^2", 4, 70, 7, 3, 1, 1), [&](Layer& l) {
    halves(l, DType::kBFloat16, Precision::kTf32), l.bias = true, l.layout = Layout::kChannelsLast;
  });
  with(rows("fp16 under tf32, 129", 300, 129), [&](Layer& l) { halves(l, DType::kFloat16, Precision::kTf32); });
  with(rows("bf16, many rows, 30", 5000, 30), [&](Layer& l) { halves(l, DType::kBFloat16, Precision::kFloat32); });
  with(rows("fp16, wide batch, 150", 2100, 150),
       [&](Layer& l) { halves(l, DType::kFloat16, Precision::kFloat32), l.bias = true; });
  with(conv("fp16 depthwise, 37 x 8^2", 3, 37, 8, 3, 1, 1, 37),
       [&](Layer& l) { halves(l, DType::kFloat16, Precision::kTf32), l.bias = true, l.decay = 0.25f; });
  with(conv("bf16 grouped 2, 24 x 6^2", 2, 24, 6, 3, 1, 1, 2),
       [&](Layer& l) { halves(l, DType::kBFloat16, Precision::kTf32), l.bias = true; });
  with(conv("fp16 grouped 2 as patches", 2, 24, 6, 3, 1, 1, 2),
       [&](Layer& l) { halves(l, DType::kFloat16, Precision::kFloat32), l.algorithm = CovarianceAlgorithm::kPatches; });
  with(conv("bf16 reduce under tf32, 20 x 9^2", 5, 20, 9, 3, 2, 1),
       [&](Layer& l) { halves(l, DType::kBFloat16, Precision::kTf32), reduce(l), l.bias = true; });
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

// Two squares and more, of all that has wide tiles: regions that are symmetric or not, odd and even numbers of squares.
std::vector<Layer> wide() {
  std::vector<Layer> layers{conv("tf32, 3x3, 132 x 3^2", 9, 132, 3, 3, 1, 1),
                            conv("bf16, 3x3, 260 x 2^2", 3, 260, 2, 3, 1, 1),
                            conv("fp16, 2x2/2, 150 x 6^2", 2, 150, 6, 2, 2, 0),
                            conv("tf32, reduce, 3x3, 33 x 5^2", 5, 33, 5, 3, 1, 1),
                            conv("bf16, grouped 2, 400 x 2^2", 9, 400, 2, 1, 1, 0, 2),
                            rows("tf32, 258", 90, 258),
                            rows("fp16, many rows, 140", 2070, 140),
                            rows("bf16, 513", 33, 513),
                            rows("tf32, 640", 77, 640),
                            rows("fp16, 900", 40, 900),
                            rows("float32, 300", 20, 300)};
  for (Layer& layer : layers) {
    layer.precision = layer.name[0] == 't' ? Precision::kTf32 : Precision::kFloat32;
    if (layer.name[0] == 'b') layer.dtype = DType::kBFloat16;
    if (layer.name.substr(0, 2) == "fp") layer.dtype = DType::kFloat16;
  }
  layers[3].mode = CovarianceMode::kReduce;
  layers[0].bias = layers[4].bias = layers[5].bias = layers[9].bias = true;
  layers[1].layout = layers[2].layout = Layout::kChannelsLast;
  layers[1].decay = layers[8].decay = 0.5f;
  layers[0].algorithm = layers[1].algorithm = CovarianceAlgorithm::kShift;
  return layers;
}

// Squares two at a time and those that are left are all squares, each once.
bool check_parts() {
  bool good = true;
  for (const bool symmetric : {false, true}) {
    for (int32_t side = 1; side <= 70; ++side) {
      std::vector<int> found(pair_count(side, symmetric));
      for (const TilePart part : {TilePart::kWide, TilePart::kRest}) {
        for (int32_t number = 0; number < part_count(part, side, symmetric); ++number) {
          const TilePair at = part_pair(part, number, side, symmetric);
          for (int32_t j = at.j; j <= at.j + (part == TilePart::kWide); ++j) {
            good = good && at.i < side && j < side && (!symmetric || j <= at.i);
            if (good) ++found[pair_number(at.i, j, side, symmetric)];
          }
        }
      }
      good = good && std::count(found.begin(), found.end(), 1) == int64_t(found.size());
    }
  }
  std::printf("parts     of up to 70 x 70 squares%s\n", good ? "" : "  FAILED");
  return good;
}

// Index maps of descriptors as large as they may be, without memory behind them.
bool check_offsets() {
  constexpr int64_t kMost = (int64_t(1) << 31) - 1, kSlot = int64_t(1) << 40;
  TileJob job{};
  job.rows.count = uint32_t(kMost);
  job.chunk = chunk_rows(job.rows.count, 16);
  job.edge = 128, job.groups = 3, job.side = 6, job.pairs = pair_count(job.side, false), job.slot = kSlot;
  const int64_t tiles = divide_up(kMost, job.chunk) * job.pairs * job.groups;
  bool good = true;
  for (int64_t tile = 0; tile < tiles; tile += 12345) {
    const TileWork work = tile_work(job, int32_t(tile));
    const int64_t chunk = tile / (job.pairs * job.groups);
    good = good && tile_slot(job, work) == kSlot + tile * 128 * 128 && work.first_row == chunk * job.chunk &&
           work.end_row == std::min<int64_t>((chunk + 1) * job.chunk, kMost);
  }
  Layer layer{"", {46340, 1, 214, 216}};
  layer.shape.out_h = 214, layer.shape.out_w = 216;
  const CovarianceProblem problem = problem_of(layer, Image{{}, {}, 1, 1, 1, 1});
  const PackJob pack = patch_job(problem);
  const int64_t rows = int64_t(46340) * 214 * 216;
  for (int64_t at = 0; at < rows; at += 98765) {
    const PackedPosition p = packed_position(pack, int32_t(at));
    good = good && (int64_t(p.sample) * 214 + p.y) * 216 + p.x == at && p.x < 216 && p.y < 214;
  }
  good = good && packed_rows(pack) == rows && packed_row(pack, 46339, 214 * 216 - 1) == rows - 1;
  const CovariancePowerJob power = CovariancePowerGroup(problem, 132).job();
  for (int32_t rank = 0, next = 0; rank <= power.team.blocks; ++rank) {
    const RowRange share = rank < power.team.blocks ? gram_share(power, rank) : RowRange{int32_t(rows), 0};
    good = good && share.first == next;
    next = share.first + share.count;
  }
  std::printf("offsets   of up to 2^31 rows%s\n", good ? "" : "  FAILED");
  return good;
}

}  // namespace

int main(int count, char** words) {
  const auto with = [](const char* name, std::vector<Layer> (*layers)()) {
    return std::pair<const std::string, std::function<bool()>>(name, [=] { return check(name, layers()); });
  };
  return program::run("covariance_emulation",
                      {with("kinds", kinds),
                       with("mlp", mlp),
                       with("resnet32", resnet32),
                       with("resnet50", resnet50),
                       with("vgg19", vgg19),
                       with("vgg19_512", vgg19_widest),
                       {"wide", [] { return check_wide(wide()); }},
                       {"parts", check_parts},
                       {"offsets", check_offsets}},
                      count, words);
}
