// Runs the CUDA scores of neurons, schedule and kernel body, with simulated threads, and compares with the formula in
// float64.
//
//   saliency_emulation [--device] [case ...]    default: all cases; prints one line a layer, ends with 1 on a failure
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "emulation.h"
#include "matrices.h"
#include "program.h"
#ifdef KFAC_WITH_CUDA
#include "saliency.h"
#endif

namespace {

using namespace kfac;
using namespace matrices;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Layer {
  int64_t outputs, neurons, block, bias;
  std::vector<float> weight, input, G;
  int64_t columns() const { return neurons * block + bias; }
};

Layer make(int64_t outputs, int64_t neurons, int64_t block, int64_t bias) {
  if (block == 1) neurons += std::exchange(bias, 0);  // a column as any other
  std::mt19937 random(unsigned(outputs + 7 * neurons + 31 * block));
  Layer layer{outputs, neurons, block, bias, {}, {}, {}};
  std::normal_distribution<float> normal(0.0f, 1.0f);
  layer.weight.resize(outputs * layer.columns());
  for (float& value : layer.weight) value = normal(random);
  layer.input = floats(positive(layer.columns(), 0.1, random));
  layer.G = floats(positive(outputs, 0.1, random));
  return layer;
}

// ---- the oracle ----------------------------------------------------------------------------------------------------

// NaN where the block is not positive definite.
double score(const Layer& layer, int64_t neuron, Saliency kind) {
  const int64_t d = layer.columns(), size = layer.block, first = neuron * size;
  Square forms(size, std::vector<double>(size, 0.0)), inputs = forms;
  std::vector<double> product(layer.outputs);
  for (int64_t b = 0; b < size; ++b) {
    for (int64_t o = 0; o < layer.outputs; ++o) {
      product[o] = 0;
      for (int64_t k = 0; k < layer.outputs; ++k) {
        product[o] += double(layer.G[o * (layer.outputs + 1) + k]) * layer.weight[k * d + first + b];
      }
    }
    for (int64_t a = 0; a < size; ++a) {
      for (int64_t o = 0; o < layer.outputs; ++o) forms[a][b] += layer.weight[o * d + first + a] * product[o];
      inputs[a][b] = layer.input[(first + std::max(a, b)) * (d + 1) + first + std::min(a, b)];
    }
  }
  if (kind == Saliency::kObs) {
    const Square solved = solve(inputs, forms);
    return solved.empty() ? kNaN : 0.5 * trace(solved);
  }
  double sum = 0;
  for (int64_t a = 0; a < size; ++a) {
    for (int64_t b = 0; b < size; ++b) sum += forms[a][b] * inputs[a][b];
  }
  return 0.5 * sum;
}

// ---- the kernel ----------------------------------------------------------------------------------------------------

struct Output {
  std::vector<std::vector<float>> scores;
  std::vector<int32_t> flags;
};

Output run(const std::vector<Layer>& layers, Saliency kind, const simulated::Schedule& how) {
  std::vector<SaliencyLayer> shapes;
  SaliencyPointers pointers{};
  program::Arrays arrays;
  Output output{std::vector<std::vector<float>>(layers.size()), {}};
  for (size_t l = 0; l < layers.size(); ++l) {
    const Layer& layer = layers[l];
    shapes.push_back(
        {layer.outputs, layer.columns(), layer.block, layer.columns(), layer.columns() + 1, layer.outputs + 1});
    output.scores[l].assign(layer.neurons, kNaN);
    output.flags.resize(output.flags.size() + layer.neurons, -1);
    pointers.weight[l] = arrays.input(layer.weight);
    pointers.input[l] = arrays.input(layer.input);
    pointers.G[l] = arrays.input(layer.G);
    pointers.scores[l] = arrays.output(output.scores[l]);
  }
  const SaliencyGroup group(shapes);
  const void* const descriptors = arrays.input(group.descriptors());
  int32_t* const flags = arrays.output(output.flags);
  if (program::on_gpu) {
    LAUNCH_ON_GPU(saliency_cuda(group, descriptors, pointers, kind, flags, nullptr));
  } else {
    emulate_saliency(group, descriptors, pointers, kind, flags, how);
  }
  arrays.fetch();
  return output;
}

bool check(const std::string& name, const std::vector<Layer>& layers, Saliency kind, double tolerance) {
  using simulated::Copies;
  using simulated::Order;
  const Output output = run(layers, kind, {Order::kForward, Copies::kLate, 3});
  const Output other = run(layers, kind, {Order::kBackward, Copies::kEarly, 5});
  bool good = true;
  const int32_t* flag = output.flags.data();
  for (size_t l = 0; l < layers.size(); ++l) {
    const Layer& layer = layers[l];
    double error = 0;
    int failed = 0;
    bool right = true;
    for (int64_t j = 0; j < layer.neurons; ++j, ++flag) {
      const double exact = score(layer, j, kind), value = output.scores[l][j];
      if (std::isnan(exact) != std::isnan(value)) right = false;
      if (kind == Saliency::kObs && *flag != int32_t(std::isnan(exact))) right = false;
      failed += std::isnan(exact);
      if (!std::isnan(exact)) error = std::max(error, std::fabs(value - exact) / exact);
    }
    const bool steady =
        memcmp(output.scores[l].data(), other.scores[l].data(), output.scores[l].size() * sizeof(float)) == 0;
    right = right && error <= tolerance;
    std::printf("%-9s %-8s %4d x (%4d x %2d + %d)  worst error %.2e  failed %d%s%s\n", name.c_str(),
                kind == Saliency::kObs ? "obs" : "obd", int(layer.outputs), int(layer.neurons), int(layer.block),
                int(layer.bias), error, failed, steady ? "" : "  DEPENDS ON THE ORDER OF THREADS",
                right ? "" : "  FAILED");
    good = good && right && steady;
  }
  return good;
}

bool check_both(const std::string& name, const std::vector<Layer>& layers) {
  return check(name, layers, Saliency::kObd, 2e-6) & check(name, layers, Saliency::kObs, 2e-6);
}

// ---- cases ---------------------------------------------------------------------------------------------------------

bool check_sizes() {
  return check_both(
      "sizes", {make(1, 1, 1, 0), make(10, 20, 1, 1), make(2, 2, 9, 0), make(15, 16, 1, 0), make(16, 17, 9, 1),
                make(17, 31, 9, 0), make(33, 5, 25, 0), make(10, 3, 64, 1), make(64, 65, 1, 0), make(129, 300, 1, 1),
                make(300, 15, 4, 0), make(65, 2, 33, 0), make(127, 128, 2, 1), make(31, 33, 16, 0)});
}

// ResNet32 and VGG19 on CIFAR, the latter at a quarter of the width.
bool check_networks() {
  return check_both("networks",
                    {make(16, 3, 9, 1), make(16, 16, 9, 1), make(32, 16, 9, 1), make(32, 16, 1, 1), make(64, 64, 9, 1),
                     make(10, 64, 1, 1), make(128, 64, 9, 1), make(128, 128, 9, 1), make(10, 128, 1, 1)});
}

// Blocks of H that are not positive definite, or not finite, and weights that are not.
bool check_failing() {
  std::vector<Layer> layers{make(20, 7, 9, 1), make(20, 30, 1, 0), make(5, 3, 20, 0)};
  for (Layer& layer : layers) {
    const int64_t d = layer.columns(), last = layer.neurons * layer.block - 1;
    layer.input[last * (d + 2)] = -1.0f;
    layer.input[layer.block * (d + 2)] = kNaN;
  }
  return check("failing", layers, Saliency::kObs, 2e-6);
}

}  // namespace

int main(int count, char** words) {
  return program::run("saliency_emulation",
                      {{"failing", check_failing}, {"networks", check_networks}, {"sizes", check_sizes}}, count, words);
}
