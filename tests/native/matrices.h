// Matrices of the programs of tests/native, and what their oracles do with them in float64.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

namespace matrices {

using Square = std::vector<std::vector<double>>;

// A random symmetric positive definite matrix that float32 holds: rank 8, and `ridge` on its diagonal.
inline Square positive(int64_t n, double ridge, std::mt19937& random) {
  std::normal_distribution<double> normal(0.0, 1.0);
  const int64_t rank = std::min<int64_t>(n, 8);
  Square rows(rank, std::vector<double>(n)), result(n, std::vector<double>(n));
  for (auto& row : rows) {
    for (double& value : row) value = normal(random);
  }
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      double sum = i == j ? ridge : 0.0;
      for (int64_t k = 0; k < rank; ++k) sum += rows[k][i] * rows[k][j] / double(rank);
      result[i][j] = result[j][i] = float(sum);
    }
  }
  return result;
}

// Its rows as a kernel sees them, each one entry, NaN, longer than it need be.
inline std::vector<float> floats(const Square& matrix) {
  std::vector<float> result;
  for (const auto& row : matrix) {
    result.insert(result.end(), row.begin(), row.end());
    result.push_back(std::numeric_limits<float>::quiet_NaN());
  }
  return result;
}

// X with A X = F, by elimination; an empty one where A is not positive definite.
inline Square solve(Square A, Square F) {
  const size_t n = A.size();
  for (size_t k = 0; k < n; ++k) {
    if (!(A[k][k] > 0)) return {};
    for (size_t i = 0; i < n; ++i) {
      if (i == k) continue;
      const double factor = A[i][k] / A[k][k];
      for (size_t j = 0; j < n; ++j) A[i][j] -= factor * A[k][j];
      for (size_t j = 0; j < F[i].size(); ++j) F[i][j] -= factor * F[k][j];
    }
  }
  for (size_t i = 0; i < n; ++i) {
    for (double& value : F[i]) value /= A[i][i];
  }
  return F;
}

inline double trace(const Square& matrix) {
  double sum = 0.0;
  for (size_t i = 0; i < matrix.size(); ++i) sum += matrix[i][i];
  return sum;
}

}  // namespace matrices
