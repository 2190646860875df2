// Runs the CUDA power iteration, distribution over blocks and kernel body, with simulated threads, and compares with
// eigenpairs iterated in float64.
//
//   power_iteration_emulation [--device] [case ...]    default: all; prints one line a matrix, ends with 1 on a failure
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "emulation.h"
#include "program.h"
#ifdef KFAC_WITH_CUDA
#include "power_iteration.h"
#endif

namespace {

using namespace kfac;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

enum class Kind { kCovariance, kIndefinite, kZero, kNotFinite, kHuge, kTiny };
enum class Start { kOnes, kZero, kNotFinite };

struct Matrix {
  int64_t n, stride;
  Kind kind;
  Start start;
  std::vector<float> entries, first;
};

// A covariance of few more rows than columns: eigenvalues spread as those of layers do.
std::vector<float> covariance(int64_t n, int64_t stride, std::mt19937& random) {
  std::normal_distribution<float> normal(0.0f, 1.0f);
  std::vector<float> entries(n * stride, kNaN);
  std::vector<double> sums(n * n, 0.0), row(n);
  for (int64_t k = 0; k < 12; ++k) {
    for (int64_t i = 0; i < n; ++i) row[i] = normal(random) + 0.4;
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j <= i; ++j) sums[i * n + j] += row[i] * row[j] / 12;
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) entries[i * stride + j] = float(sums[std::max(i, j) * n + std::min(i, j)]);
  }
  return entries;
}

Matrix make(int64_t n, Kind kind, Start start, std::mt19937& random) {
  Matrix m{n, n + n % 3, kind, start, {}, {}};
  m.entries = covariance(n, m.stride, random);
  m.first.assign(n, start == Start::kZero ? 0.0f : 1.0f);
  if (start == Start::kNotFinite) m.first[n / 2] = std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      float& entry = m.entries[i * m.stride + j];
      if (kind == Kind::kIndefinite) entry = -entry + (i == j ? 0.01f : 0.0f);
      if (kind == Kind::kZero) entry = 0.0f;
      if (kind == Kind::kHuge) entry *= 1e30f;
      if (kind == Kind::kTiny) entry *= 1e-30f;
    }
  }
  if (kind == Kind::kNotFinite) m.entries[(n - 1) * m.stride] = kNaN;
  return m;
}

struct Pair {
  double value, residual;
  int iterations;
  std::vector<float> vector;
};

// ---- the oracle ----------------------------------------------------------------------------------------------------

std::vector<double> start_of(const Matrix& m) {
  std::vector<double> v(m.n);
  for (int64_t i = 0; i < m.n; ++i)
    v[i] = m.start == Start::kOnes ? m.first[i] : 1 + 0.5 * std::cos(1 + 1.7 * double(i));
  return v;
}

void normalize(std::vector<double>& v) {
  double sum = 0;
  for (const double x : v) sum += x * x;
  for (double& x : v) x /= std::sqrt(sum);
}

// The same number of steps, in float64.
Pair oracle(const Matrix& m, int steps) {
  std::vector<double> v = start_of(m), image(m.n);
  normalize(v);
  Pair pair{0, 0, steps, {}};
  for (int step = 0; step < steps; ++step) {
    double rest = 0;
    pair.value = 0;
    for (int64_t i = 0; i < m.n; ++i) {
      image[i] = 0;
      for (int64_t j = 0; j < m.n; ++j) image[i] += double(m.entries[i * m.stride + j]) * v[j];
      pair.value += image[i] * v[i];
    }
    for (int64_t i = 0; i < m.n; ++i) rest += std::pow(image[i] - pair.value * v[i], 2);
    pair.residual = std::sqrt(rest) / std::fabs(pair.value);
    if (m.kind == Kind::kZero) pair.residual = 0;
    if (m.kind == Kind::kZero || m.kind == Kind::kNotFinite) break;
    v = image;
    normalize(v);
  }
  if (m.kind == Kind::kNotFinite) pair.value = pair.residual = kNaN;
  pair.vector.assign(v.begin(), v.end());
  return pair;
}

// ---- the kernel ----------------------------------------------------------------------------------------------------

struct Device {
  int blocks;
  int64_t shared_bytes;
};

// A GPU is taken as large as these: the same teams, the same exchanges.
std::vector<Pair> iterate(const std::vector<Matrix>& matrices, const PowerMethod& method, const Device& device,
                          simulated::Order order) {
  std::vector<Pair> pairs(matrices.size());
  std::vector<MatrixShape> shapes;
  PowerPointers pointers{};
  program::Arrays arrays;
  for (size_t i = 0; i < matrices.size(); ++i) {
    shapes.push_back({matrices[i].n, matrices[i].stride});
    pairs[i].vector = matrices[i].first;
    pointers.matrix[i] = arrays.input(matrices[i].entries);
    pointers.vector[i] = arrays.output(pairs[i].vector);
  }
  const PowerGroup group(shapes, device.blocks, device.shared_bytes);
  std::vector<float> values(matrices.size(), -1), residuals(matrices.size(), -1);
  std::vector<int32_t> iterations(matrices.size(), -1);
  const PowerResults results{arrays.output(values), arrays.output(residuals), arrays.output(iterations)};
  const void* const descriptors = arrays.input(group.descriptors());
  float* const workspace = static_cast<float*>(arrays.scratch(group.workspace_bytes()));
  if (program::on_gpu) {
    LAUNCH_ON_GPU(power_iteration_cuda(group, descriptors, workspace, pointers, method, results, nullptr));
  } else {
    emulate_power_iteration(group, descriptors, workspace, pointers, method, results, order);
  }
  arrays.fetch();
  for (size_t i = 0; i < pairs.size(); ++i) {
    pairs[i].value = values[i], pairs[i].residual = residuals[i], pairs[i].iterations = iterations[i];
  }
  return pairs;
}

// ---- checks --------------------------------------------------------------------------------------------------------

bool near(double value, double exact, double relative, double absolute = 0) {
  return (std::isnan(value) && std::isnan(exact)) || std::fabs(value - exact) <= relative * std::fabs(exact) + absolute;
}

bool stops_in_time(const Matrix& m, const Pair& pair, const PowerMethod& method) {
  if (m.kind == Kind::kZero || m.kind == Kind::kNotFinite) return pair.iterations == 1;
  if (pair.iterations > 1 && oracle(m, pair.iterations - 1).residual <= 0.999 * method.tol) return false;
  return pair.residual <= method.tol || pair.iterations == method.max_iter;
}

bool same(const Pair& a, const Pair& b) {
  return memcmp(&a.value, &b.value, sizeof a.value) == 0 && memcmp(&a.residual, &b.residual, sizeof a.value) == 0 &&
         a.iterations == b.iterations && memcmp(a.vector.data(), b.vector.data(), 4 * a.vector.size()) == 0;
}

bool check(const std::string& name, const std::vector<Matrix>& matrices, const Device& device,
           const PowerMethod& method) {
  const std::vector<Pair> pairs = iterate(matrices, method, device, simulated::Order::kForward);
  const std::vector<Pair> others = iterate(matrices, method, device, simulated::Order::kBackward);
  bool good = true;
  for (size_t i = 0; i < matrices.size(); ++i) {
    const Matrix& m = matrices[i];
    const Pair exact = oracle(m, pairs[i].iterations);
    double error = 0;
    for (int64_t j = 0; j < m.n; ++j) error += std::pow(double(pairs[i].vector[j]) - exact.vector[j], 2);
    const bool right = near(pairs[i].value, exact.value, 1e-6) && near(pairs[i].residual, exact.residual, 1e-3, 2e-6) &&
                       std::sqrt(error) < 1e-5 && stops_in_time(m, pairs[i], method);
    const bool steady = same(pairs[i], others[i]);
    std::printf("%-9s n %5d  kind %d  steps %3d  value %.7e (%.7e)  residual %.2e  vector %.1e%s%s\n", name.c_str(),
                int(m.n), int(m.kind), pairs[i].iterations, pairs[i].value, exact.value, pairs[i].residual,
                std::sqrt(error), steady ? "" : "  DEPENDS ON THE ORDER OF THREADS", right ? "" : "  FAILED");
    good = good && right && steady;
  }
  return good;
}

// ---- cases ---------------------------------------------------------------------------------------------------------

std::vector<Matrix> covariances(const std::vector<int64_t>& sizes) {
  std::mt19937 random(1);
  std::vector<Matrix> matrices;
  for (const int64_t n : sizes) matrices.push_back(make(n, Kind::kCovariance, Start(matrices.size() % 3), random));
  return matrices;
}

bool check_sizes() {
  return check("sizes", covariances({1, 2, 15, 16, 17, 31, 33, 64, 127, 128, 129, 300}), {7, 100 << 10}, {1e-3, 100}) &
         check("few", covariances({300, 17, 129, 33}), {2, 16 << 10}, {1e-5, 100}) &
         check("one block", covariances({70, 31}), {1, 8 << 10}, {0.0, 5}) &
         check("one step", covariances({70}), {3, 8 << 10}, {0.0, 1});
}

// Matrices that have no eigenpair to find, beside one that has, alone and in teams.
bool check_kinds() {
  std::mt19937 random(2);
  std::vector<Matrix> matrices;
  for (const int64_t n : {90, 5}) {
    for (const Kind kind :
         {Kind::kCovariance, Kind::kIndefinite, Kind::kZero, Kind::kNotFinite, Kind::kHuge, Kind::kTiny}) {
      matrices.push_back(make(n, kind, Start::kOnes, random));
    }
  }
  return check("kinds", matrices, {40, 10 << 10}, {1e-3, 60});
}

// Factors of CIFAR networks at a third of the width, on a device with a third of the shared memory.
bool check_resnet32() {
  return check("resnet32", covariances({27, 16, 145, 16, 145, 32, 289, 32, 289, 64, 577, 64, 577, 64, 65, 10}),
               {12, 75 << 10}, {1e-2, 50});
}

bool check_vgg19() {
  return check("vgg19", covariances({27, 64, 193, 64, 193, 128, 385, 128, 769, 256, 769, 171, 1537, 171, 10}),
               {11, 75 << 10}, {1e-3, 50});
}

}  // namespace

int main(int count, char** words) {
  return program::run(
      "power_iteration_emulation",
      {{"kinds", check_kinds}, {"resnet32", check_resnet32}, {"sizes", check_sizes}, {"vgg19", check_vgg19}}, count,
      words);
}
