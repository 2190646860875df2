// Runs the CUDA damped inverses, schedule and kernel bodies, with simulated threads, and compares with Cholesky in
// float64.
//
//   inverse_emulation [--device] [case ...]    default: all cases; prints one line a matrix, ends with 1 on a failure
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "emulation.h"
#include "program.h"
#ifdef KFAC_WITH_CUDA
#include "inverse.h"
#endif

namespace {

using namespace kfac;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

enum class Kind { kCovariance, kIllConditioned, kIndefinite, kNotFinite, kZero };

struct Matrix {
  int64_t n, stride;
  Kind kind;
  double amount;
  std::vector<float> entries, diagonal;  // the upper triangle is NaN: it is not to be read
};

Matrix make(int64_t n, Kind kind, std::mt19937& random) {
  Matrix m{n, n + n % 3, kind, kind == Kind::kIllConditioned ? 1e-4 : 0.05, {}, {}};
  m.entries.assign(n * m.stride, kNaN);
  const int64_t rank = std::min<int64_t>(n, 24);
  std::normal_distribution<float> normal(0.0f, 1.0f);
  std::vector<double> rows(rank * n);
  for (double& value : rows) value = normal(random) + 0.4;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      double sum = 0;
      for (int64_t k = 0; k < rank; ++k) sum += rows[k * n + i] * rows[k * n + j];
      m.entries[i * m.stride + j] = kind == Kind::kZero ? 0.0f : float(sum / double(rank));
    }
  }
  if (kind == Kind::kZero) m.amount = 0;
  if (kind == Kind::kIndefinite) m.entries[(n / 2) * (m.stride + 1)] = -1.0f;
  if (kind == Kind::kNotFinite) m.entries[(n - 1) * m.stride] = kNaN;
  if (n % 2) {
    m.diagonal.resize(n);
    for (int64_t i = 0; i < n; ++i) m.diagonal[i] = kind == Kind::kCovariance ? 0.01f * float(i % 5) : 0.0f;
  }
  return m;
}

// ---- the oracle ----------------------------------------------------------------------------------------------------

struct Inverse {
  std::vector<double> entries;
  int info = 0;
  double condition = 0;  // of the infinity norm
};

double norm_of_rows(const std::vector<double>& a, int64_t n) {
  double most = 0;
  for (int64_t i = 0; i < n; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < n; ++j) sum += std::fabs(a[i * n + j]);
    most = std::max(most, sum);
  }
  return most;
}

// L of a = L L^T in place; 0, or the order of the first minor that is not positive.
int factor(std::vector<double>& a, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    double* const row = a.data() + j * n;
    for (int64_t i = 0; i < j; ++i) {
      double sum = row[i];
      for (int64_t k = 0; k < i; ++k) sum -= row[k] * a[i * n + k];
      row[i] = sum / a[i * n + i];
      row[j] -= row[i] * row[i];
    }
    if (!(row[j] > 0)) return int(j) + 1;
    row[j] = std::sqrt(row[j]);
  }
  return 0;
}

Inverse oracle(const Matrix& m) {
  const int64_t n = m.n;
  std::vector<double> a(n * n);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j <= i; ++j) a[i * n + j] = a[j * n + i] = m.entries[i * m.stride + j];
    a[i * (n + 1)] += double(float(m.amount)) + (m.diagonal.empty() ? 0.0 : double(m.diagonal[i]));
  }
  Inverse result;
  result.condition = norm_of_rows(a, n);
  result.info = factor(a, n);
  if (result.info) return result;
  // rows of L^-1 in `lower`, then L^-T L^-1
  std::vector<double> lower(n * n, 0.0);
  result.entries.assign(n * n, 0.0);
  for (int64_t i = 0; i < n; ++i) {
    lower[i * (n + 1)] = 1;
    for (int64_t k = 0; k < i; ++k) {
      for (int64_t j = 0; j <= k; ++j) lower[i * n + j] -= a[i * n + k] * lower[k * n + j];
    }
    for (int64_t j = 0; j <= i; ++j) lower[i * n + j] /= a[i * (n + 1)];
  }
  for (int64_t k = 0; k < n; ++k) {
    for (int64_t i = 0; i <= k; ++i) {
      for (int64_t j = 0; j <= k; ++j) result.entries[i * n + j] += lower[k * n + i] * lower[k * n + j];
    }
  }
  result.condition *= norm_of_rows(result.entries, n);
  return result;
}

// ---- the kernels ---------------------------------------------------------------------------------------------------

struct Output {
  std::vector<std::vector<float>> inverses;
  std::vector<int32_t> infos;
};

Output invert(const std::vector<Matrix>& matrices, const simulated::Schedule& how) {
  std::vector<InverseShape> shapes;
  std::vector<double> amounts;
  Output output{std::vector<std::vector<float>>(matrices.size()), std::vector<int32_t>(matrices.size(), -1)};
  InversePointers pointers{};
  program::Arrays arrays;
  for (size_t i = 0; i < matrices.size(); ++i) {
    const Matrix& m = matrices[i];
    shapes.push_back({m.n, m.stride});
    amounts.push_back(m.amount);
    output.inverses[i].assign(m.n * m.n, kNaN);
    pointers.matrix[i] = arrays.input(m.entries);
    pointers.diagonal[i] = m.diagonal.empty() ? nullptr : arrays.input(m.diagonal);
    pointers.inverse[i] = arrays.output(output.inverses[i]);
  }
  const InverseGroup group(shapes);
  const void* const descriptors = arrays.input(group.descriptors());
  float* const workspace = static_cast<float*>(arrays.scratch(group.workspace_bytes()));
  const InverseArguments arguments{arrays.input(amounts), arrays.output(output.infos)};
  if (program::on_gpu) {
    LAUNCH_ON_GPU(damped_inverse_cuda(group, descriptors, workspace, pointers, arguments, nullptr));
  } else {
    emulate_inverse(group, descriptors, workspace, pointers, arguments, how);
  }
  arrays.fetch();
  return output;
}

// ---- checks --------------------------------------------------------------------------------------------------------

bool symmetric(const std::vector<float>& a, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < i; ++j) {
      if (memcmp(&a[i * n + j], &a[j * n + i], sizeof(float)) != 0) return false;
    }
  }
  return true;
}

bool all_nan(const std::vector<float>& a) {
  for (const float value : a) {
    if (!std::isnan(value)) return false;
  }
  return true;
}

double relative_error(const std::vector<float>& value, const std::vector<double>& exact) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    error += (value[i] - exact[i]) * (value[i] - exact[i]);
    norm += exact[i] * exact[i];
  }
  return std::sqrt(error / norm);
}

bool check(const std::string& name, const std::vector<Matrix>& matrices) {
  using simulated::Copies;
  using simulated::Order;
  const Output output = invert(matrices, {Order::kForward, Copies::kLate, 3});
  const Output other = invert(matrices, {Order::kBackward, Copies::kEarly, 5});
  bool good = true;
  for (size_t i = 0; i < matrices.size(); ++i) {
    const Matrix& m = matrices[i];
    const Inverse exact = oracle(m);
    const std::vector<float>& value = output.inverses[i];
    const double error = exact.info ? 0 : relative_error(value, exact.entries);
    const bool close = exact.info ? all_nan(value) : error <= 2e-8 * std::max(12.0, exact.condition);
    const bool steady = memcmp(value.data(), other.inverses[i].data(), 4 * value.size()) == 0;
    const bool right =
        close && output.infos[i] == exact.info && other.infos[i] == exact.info && (exact.info || symmetric(value, m.n));
    std::printf("%-9s n %5d  kind %d  condition %.1e  error %.2e  info %d (%d)%s%s\n", name.c_str(), int(m.n),
                int(m.kind), exact.condition, error, output.infos[i], exact.info,
                steady ? "" : "  DEPENDS ON THE ORDER OF THREADS", right ? "" : "  FAILED");
    good = good && right && steady;
  }
  return good;
}

// ---- cases ---------------------------------------------------------------------------------------------------------

std::vector<Matrix> matrices_of(const std::vector<int64_t>& sizes, const std::vector<Kind>& kinds) {
  std::mt19937 random(1);
  std::vector<Matrix> matrices;
  for (const Kind kind : kinds) {
    for (const int64_t n : sizes) matrices.push_back(make(n, kind, random));
  }
  return matrices;
}

const std::vector<int64_t> kSizes{1, 2, 15, 16, 17, 31, 33, 64, 127, 128};

bool check_small() {
  return check("small", matrices_of(kSizes, {Kind::kCovariance, Kind::kIllConditioned}));
}

bool check_failing() {
  return check("failing", matrices_of(kSizes, {Kind::kIndefinite, Kind::kNotFinite, Kind::kZero}));
}

// Factors of ResNet32 and, at a third of the width, of VGG19; sizes around tiles' edges.
bool check_large() {
  return check("large", matrices_of({129, 300, 255, 256, 257, 64, 145, 289}, {Kind::kCovariance})) &
         check("large", matrices_of({577, 129, 385}, {Kind::kCovariance, Kind::kIllConditioned}));
}

bool check_wide() {
  return check("wide", matrices_of({897, 769}, {Kind::kCovariance}));
}

bool check_failing_large() {
  return check("failing", matrices_of({300, 129, 30, 200}, {Kind::kIndefinite, Kind::kNotFinite, Kind::kZero}));
}

bool check_pi() {
  const std::vector<float> A{4, 9, 9, 8}, G{3, 0, 0, 0, 3, 0, 0, 0, 3}, zero(1, 0.0f);
  PiPairs pairs{};
  pairs.count = 2;
  program::Arrays arrays;
  const float* const first = arrays.input(A);
  const float* const matrices[2][2] = {{first, arrays.input(G)}, {arrays.input(zero), first}};
  const int32_t sizes[2][2] = {{2, 3}, {1, 2}};
  for (int pair = 0; pair < 2; ++pair) {
    for (int which = 0; which < 2; ++which) {
      pairs.matrix[pair][which] = matrices[pair][which];
      pairs.stride[pair][which] = pairs.n[pair][which] = sizes[pair][which];
      pairs.place[pair][which] = 3 - 2 * pair - which;
    }
  }
  std::vector<double> amounts(4, -1.0);
  double* const found = arrays.output(amounts);
  if (program::on_gpu) {
    LAUNCH_ON_GPU(pi_damping_cuda(pairs, 0.04, found, nullptr));
  } else {
    emulate_pi_damping(pairs, 0.04, found);
  }
  arrays.fetch();
  const double wanted[4] = {0.2, 0.2, 0.2 / std::sqrt(2.0), 0.2 * std::sqrt(2.0)};
  bool good = true;
  for (int i = 0; i < 4; ++i) good = good && std::fabs(amounts[i] - wanted[i]) < 1e-15;
  std::printf("pi        %s\n", good ? "" : "FAILED");
  return good;
}

}  // namespace

int main(int count, char** words) {
  return program::run("inverse_emulation",
                      {{"failing", check_failing},
                       {"failing_large", check_failing_large},
                       {"large", check_large},
                       {"pi", check_pi},
                       {"small", check_small},
                       {"wide", check_wide}},
                      count, words);
}
