// Runs the matrix-free CUDA power iteration, schedule and kernel body, with simulated threads, and compares with
// eigenpairs of the patches' covariance iterated in float64.
//
//   power_iteration_covariance_emulation [--device] [case ...]    default: all cases; ends with 1 on a failure
#include <cmath>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#include "emulation.h"
#include "program.h"
#include "random_layers.h"
#ifdef KFAC_WITH_CUDA
#include "power_iteration_covariance.h"
#endif

namespace {

using namespace layers;

struct Case {
  Layer layer;
  int blocks;           // of the device
  float first = 0.0f;   // entries of the start; 0: the default
  float spoilt = 0.0f;  // written over the first value of the input, unless 0
};

struct Pair {
  double value = -1, residual = -1;
  int iterations = -1;
  std::vector<float> vector;
};

constexpr PowerMethod kMethod{1e-3, 40};

// ---- the oracle ----------------------------------------------------------------------------------------------------

void normalize(std::vector<double>& v) {
  double sum = 0;
  for (const double x : v) sum += x * x;
  for (double& x : v) x /= std::sqrt(sum);
}

// The same number of steps, in float64.
Pair oracle(const Case& c, const Image& image, int steps) {
  const std::vector<std::vector<double>> rows = patches(c.layer, image, 0);
  const size_t n = rows[0].size();
  std::vector<double> v(n), product(n);
  for (size_t i = 0; i < n; ++i) v[i] = c.first != 0 ? c.first : 1 + 0.5 * std::cos(1 + 1.7 * double(i));
  normalize(v);
  Pair pair;
  pair.iterations = steps;
  for (int step = 0; step < steps; ++step) {
    std::fill(product.begin(), product.end(), 0.0);
    for (const std::vector<double>& row : rows) {
      double dot = 0;
      for (size_t i = 0; i < n; ++i) dot += row[i] * v[i];
      for (size_t i = 0; i < n; ++i) product[i] += dot * row[i] / double(rows.size());
    }
    double rest = 0;
    pair.value = 0;
    for (size_t i = 0; i < n; ++i) pair.value += product[i] * v[i];
    for (size_t i = 0; i < n; ++i) rest += std::pow(product[i] - pair.value * v[i], 2);
    pair.residual = pair.value == 0 ? 0 : std::sqrt(rest) / std::fabs(pair.value);
    if (pair.value == 0 || !std::isfinite(pair.value)) break;
    v = product;
    normalize(v);
  }
  pair.vector.assign(v.begin(), v.end());
  return pair;
}

// ---- the kernel ----------------------------------------------------------------------------------------------------

Pair iterate(const Case& c, const Image& image, simulated::Order order) {
  const int64_t n = c.layer.shape.patch_size() + c.layer.bias;
  const CovariancePowerGroup group(problem_of(c.layer, image), c.blocks);
  Pair pair;
  pair.vector.assign(n, c.first);
  std::vector<float> value(1, -1), residual(1, -1);
  std::vector<int32_t> iterations(1, -1);
  program::Arrays arrays;
  const void* const data = arrays.input(image.bytes);
  float* const vector = arrays.output(pair.vector);
  const PowerResults results{arrays.output(value), arrays.output(residual), arrays.output(iterations)};
  float* const workspace = static_cast<float*>(arrays.scratch(group.workspace_bytes()));
  if (program::on_gpu) {
    LAUNCH_ON_GPU(covariance_power_iteration_cuda(group, data, vector, workspace, kMethod, results, nullptr));
  } else {
    emulate_covariance_power(group, data, vector, workspace, kMethod, results, order);
  }
  arrays.fetch();
  pair.value = value[0], pair.residual = residual[0], pair.iterations = iterations[0];
  return pair;
}

// ---- checks --------------------------------------------------------------------------------------------------------

bool near(double value, double exact, double relative, double absolute = 0) {
  return (!std::isfinite(value) && !std::isfinite(exact)) ||
         std::fabs(value - exact) <= relative * std::fabs(exact) + absolute;
}

// Stopped at the first step whose residual is small enough, and no later.
bool stops_in_time(const Case& c, const Image& image, const Pair& pair) {
  if (pair.value == 0 || std::isnan(pair.value)) return pair.iterations == 1;
  if (pair.iterations > 1 && oracle(c, image, pair.iterations - 1).residual <= 0.999 * kMethod.tol) return false;
  return pair.residual <= kMethod.tol || pair.iterations == kMethod.max_iter;
}

bool same(const Pair& a, const Pair& b) {
  return memcmp(&a.value, &b.value, sizeof a.value) == 0 && memcmp(&a.residual, &b.residual, sizeof a.value) == 0 &&
         a.iterations == b.iterations && memcmp(a.vector.data(), b.vector.data(), 4 * a.vector.size()) == 0;
}

bool check(const Case& c, unsigned seed) {
  Image image = random_image(c.layer, seed);
  if (c.spoilt != 0) {
    memcpy(image.bytes.data(), &c.spoilt, sizeof c.spoilt);
    image.values[0] = c.spoilt;
  }
  const Pair pair = iterate(c, image, simulated::Order::kForward);
  const Pair other = iterate(c, image, simulated::Order::kBackward);
  const Pair exact = oracle(c, image, pair.iterations);
  double error = 0;
  for (size_t i = 0; i < pair.vector.size(); ++i) error += std::pow(double(pair.vector[i]) - exact.vector[i], 2);
  const bool right = near(pair.value, exact.value, 1e-6) && near(pair.residual, exact.residual, 1e-3, 2e-6) &&
                     (std::isnan(pair.value) || std::sqrt(error) < 1e-5) && stops_in_time(c, image, pair);
  const bool steady = same(pair, other);
  std::printf("%-26s blocks %2d  steps %3d  value %.7e (%.7e)  residual %.2e  vector %.1e%s%s\n", c.layer.name.c_str(),
              c.blocks, pair.iterations, pair.value, exact.value, pair.residual, std::sqrt(error),
              steady ? "" : "  DEPENDS ON THE ORDER OF THREADS", right ? "" : "  FAILED");
  return right && steady;
}

bool check_all(const std::vector<Case>& cases) {
  bool good = true;
  for (size_t i = 0; i < cases.size(); ++i) good = check(cases[i], unsigned(i + 1)) && good;
  return good;
}

// ---- cases ---------------------------------------------------------------------------------------------------------

Layer with(Layer layer, bool bias, Layout layout = Layout::kContiguous, DType dtype = DType::kFloat32) {
  layer.bias = bias;
  layer.layout = layout;
  layer.dtype = dtype;
  return layer;
}

bool check_sizes() {
  return check_all({{with(rows("one row, one feature", 1, 1), false), 3},
                    {with(rows("one row", 1, 31), true), 3},
                    {with(rows("511 x 32", 511, 32), false), 2, 1.0f},
                    {with(rows("513 x 33", 513, 33), true), 3, 1.0f},
                    {with(rows("1100 x 129", 1100, 129), true), 5},
                    {with(rows("600 x 700", 600, 700), false), 3}});
}

bool check_kinds() {
  const Layer image = conv("17 x 9^2", 3, 17, 9, 3, 1, 1);
  Layer dilated{"dilation 2, 16 x 11 x 9", {2, 16, 11, 9, 3, 2, 1, 2, 2, 2, 2, 2, 11, 6, 1}};
  return check_all({{with(image, true), 1},
                    {with(image, true, Layout::kChannelsLast), 2},
                    {with(image, false, Layout::kContiguous, DType::kBFloat16), 3},
                    {with(image, true, Layout::kChannelsLast, DType::kFloat16), 3},
                    {with(dilated, true), 2},
                    {with(dilated, false, Layout::kChannelsLast), 2},
                    {with(conv("one pixel, 16 x 1^2", 3, 16, 1, 3, 1, 1), true), 2},
                    {with(conv("below the kernel, 9 x 2^2", 3, 9, 2, 5, 1, 2), false), 2},
                    {with(conv("one channel, 1 x 9^2", 2, 1, 9, 3, 1, 1), true, Layout::kChannelsLast), 2},
                    {with(conv("stride 3, 16 x 10^2", 2, 16, 10, 3, 3, 2), false), 2}});
}

// Inputs without an eigenpair to find, and starts that are none.
bool check_failing() {
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN(), kInfinite = std::numeric_limits<float>::infinity();
  Layer padding{"padding only, 8 x 1^2", {2, 8, 1, 1, 1, 1, 3, 3, 1, 1, 1, 1, 1, 1, 1}};
  const Layer image = conv("16 x 9^2", 8, 16, 9, 3, 1, 1);
  return check_all({{image, 3, 0, kNaN}, {image, 3, 0, kInfinite}, {padding, 3}});
}

// The A of ResNet32 and of VGG19 (narrower), in both layouts.
bool check_networks() {
  return check_all({{with(conv("conv 3x3, 3 x 32^2", 2, 3, 32, 3, 1, 1), true), 4},
                    {with(conv("conv 3x3, 16 x 32^2", 1, 16, 32, 3, 1, 1), true, Layout::kChannelsLast), 4},
                    {with(conv("conv 3x3/2, 32 x 16^2", 3, 32, 16, 3, 2, 1), true), 4},
                    {with(conv("conv 3x3, 64 x 8^2", 2, 64, 8, 3, 1, 1), false, Layout::kChannelsLast), 4},
                    {with(conv("conv 7x7/2, 3 x 40^2", 1, 3, 40, 7, 2, 3), false), 4},
                    {with(rows("fc, 784", 33, 784), true), 4}});
}

}  // namespace

int main(int count, char** words) {
  return program::run(
      "power_iteration_covariance_emulation",
      {{"failing", check_failing}, {"kinds", check_kinds}, {"networks", check_networks}, {"sizes", check_sizes}}, count,
      words);
}
