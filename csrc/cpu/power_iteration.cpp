#include "kfac/power_iteration.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "buffer.h"
#include "cost_order.h"
#include "kfac/checked.h"
#include "kfac/parallel.h"
#include "kfac/simd_linalg.h"

namespace kfac {
namespace {

constexpr double kSharedSize = 768;     // from here on all threads may work on one matrix
constexpr int64_t kTriangleSize = 256;  // from here on reading half the matrix is worth two products an entry
constexpr int64_t kStripeRows = 256;    // rows whose products are summed as T before they join the sum in double

constexpr int64_t padded(int64_t n) {
  return divide_up(n, kPanel) * kPanel;
}

// A v by rows: sum of v_i a_i, all of A read.
template <class T>
class FullProduct {
 public:
  explicit FullProduct(const EigenProblem& problem)
      : n_(problem.n),
        columns_(padded(n_)),
        matrix_(static_cast<const T*>(problem.matrix)),
        stride_(problem.stride),
        sum_(columns_) {
    if (columns_ != n_) copy_padded();
  }

  void operator()(const T* v, double* image) {
    linalg_kernels<T>().left_product(n_, columns_, matrix_, stride_, v, sum_.data());
    for (int64_t j = 0; j < n_; ++j) image[j] = sum_[j];
  }

 private:
  // Vector loads would reach beyond the last row.
  void copy_padded() {
    copy_.assign(elements<T>(Checked(n_) * columns_), T(0));
    for (int64_t i = 0; i < n_; ++i) std::copy_n(matrix_ + i * stride_, n_, copy_.data() + i * columns_);
    matrix_ = copy_.data();
    stride_ = columns_;
  }

  const int64_t n_, columns_;
  const T* matrix_;
  int64_t stride_;
  Buffer<T> copy_, sum_;
};

// A v from the lower triangle: an entry below the diagonal serves two sums. Stripes of rows are summed apart, so that
// threads may share them and the result does not depend on how many there are.
template <class T>
class TriangleProduct {
 public:
  TriangleProduct(const EigenProblem& problem, int threads)
      : n_(problem.n),
        matrix_(static_cast<const T*>(problem.matrix)),
        stride_(problem.stride),
        threads_(threads),
        stripes_(divide_up(n_, kStripeRows)),
        sums_(elements<T>(Checked(stripes_) * padded(n_))),
        corner_(kTile, T(0)) {
    const int64_t block = n_ / kPanel * kPanel;
    for (int64_t i = block; i < n_; ++i) {
      std::copy(matrix_ + i * stride_ + block, matrix_ + i * stride_ + n_, corner_.data() + (i - block) * kPanel);
    }
  }

  void operator()(const T* v, double* image) {
    parallel_for(stripes_, threads_, [&](int64_t s) { sum_stripe(up_ ? s : stripes_ - 1 - s, v); });
    if (threads_ == 1) up_ = !up_;  // the next product begins with what this one left in the cache
    std::fill_n(image, n_, 0.0);
    for (int64_t s = 0; s < stripes_; ++s) {
      const T* sums = sums_.data() + s * padded(n_);
      for (int64_t j = 0; j < std::min(n_, (s + 1) * kStripeRows); ++j) image[j] += sums[j];
    }
  }

 private:
  // sums [last]: what rows [first, last) add to A v, for their own entries and for those of the columns before.
  void sum_stripe(int64_t stripe, const T* v) {
    const int64_t first = stripe * kStripeRows, last = std::min(n_, first + kStripeRows);
    T* sums = sums_.data() + stripe * padded(n_);
    std::fill_n(sums, padded(last), T(0));
    linalg_kernels<T>().lower_product(first, last, n_, matrix_, stride_, corner_.data(), v, sums);
  }

  const int64_t n_;
  const T* matrix_;
  const int64_t stride_;
  const int threads_;
  const int64_t stripes_;
  bool up_ = false;  // several threads take the long ones, which come last, first
  Buffer<T> sums_, corner_;
};

template <class T>
void solve(EigenProblem& problem, const PowerIteration& method, int threads) {
  T* vector = static_cast<T*>(problem.vector);
  if (problem.n < kTriangleSize) {
    FullProduct<T> product(problem);
    problem.result = iterate<T>(std::ref(product), problem.n, vector, method);
  } else {
    TriangleProduct<T> product(problem, threads);
    problem.result = iterate<T>(std::ref(product), problem.n, vector, method);
  }
}

// v <- v / |v|; false if v is zero or not finite.
template <class T>
bool normalize(int64_t n, T* v) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += double(v[i]) * v[i];
  if (!(sum > 0 && std::isfinite(sum))) return false;
  const double scale = 1 / std::sqrt(sum);
  for (int64_t i = 0; i < n; ++i) v[i] = T(v[i] * scale);
  return true;
}

// Every matrix can be read, and no vector is another's, or part of a matrix.
void check_problems(const EigenProblem* problems, int64_t count, int64_t size) {
  std::vector<std::pair<uintptr_t, uintptr_t>> vectors;
  for (int64_t i = 0; i < count; ++i) {
    check_matrix("a matrix", problems[i].n, problems[i].n, problems[i].stride);
    const auto start = reinterpret_cast<uintptr_t>(problems[i].vector);
    vectors.emplace_back(start, start + uintptr_t(problems[i].n * size));
  }
  std::sort(vectors.begin(), vectors.end());
  const auto overlaps = [](const auto& a, const auto& b) { return a.second > b.first; };
  if (std::adjacent_find(vectors.begin(), vectors.end(), overlaps) != vectors.end()) {
    throw std::invalid_argument("vectors share memory");
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t bytes = ((problems[i].n - 1) * problems[i].stride + problems[i].n) * size;
    const auto start = reinterpret_cast<uintptr_t>(problems[i].matrix);
    const auto after = std::lower_bound(vectors.begin(), vectors.end(), std::make_pair(start, start));
    const bool from_before = after != vectors.begin() && after[-1].second > start;
    if (from_before || (after != vectors.end() && after->first < start + uintptr_t(bytes))) {
      throw std::invalid_argument("a vector and a matrix share memory");
    }
  }
}

}  // namespace

template <class T>
void start_vector(int64_t n, T* vector) {
  double sum = 0;
  const auto entry = [](int64_t i) { return 1 + 0.5 * std::cos(1 + 1.7 * double(i)); };
  for (int64_t i = 0; i < n; ++i) sum += entry(i) * entry(i);
  for (int64_t i = 0; i < n; ++i) vector[i] = T(entry(i) / std::sqrt(sum));
}

template <class T>
Eigenpair iterate(const Product<T>& product, int64_t n, T* vector, const PowerIteration& method) {
  Buffer<T> v(padded(n), T(0));
  Buffer<double> image(n);
  std::copy_n(vector, n, v.data());
  if (!normalize(n, v.data())) start_vector(n, v.data());
  Eigenpair result{};
  while (result.iterations < method.max_iter) {
    check_interrupt();
    ++result.iterations;
    product(v.data(), image.data());
    double moments[3];
    linalg_kernels<T>().rayleigh(n, image.data(), v.data(), moments);
    const double norm = std::sqrt(moments[1]);
    result.value = moments[0];
    result.residual = norm == 0 ? 0 : std::sqrt(moments[2]) / std::abs(result.value);
    if (!std::isfinite(norm)) result.value = result.residual = std::numeric_limits<double>::quiet_NaN();
    if (norm == 0 || !std::isfinite(norm)) break;
    for (int64_t i = 0; i < n; ++i) v[i] = T(image[i] / norm);
    if (result.residual <= method.tol) break;
  }
  std::copy_n(v.data(), n, vector);
  return result;
}

void power_iteration_cpu(EigenProblem* problems, int64_t count, DType dtype, const PowerIteration& method,
                         int threads) {
  check_problems(problems, count, dtype == DType::kFloat64 ? 8 : 4);
  const CostOrder order(count, [&](int64_t i) { return double(problems[i].n) * double(problems[i].n); });
  const auto run = dtype == DType::kFloat64 ? solve<double> : solve<float>;
  order.run(kSharedSize * kSharedSize, threads, [&](int64_t i, int own) { run(problems[i], method, own); });
}

template void start_vector(int64_t, float*);
template void start_vector(int64_t, double*);
template Eigenpair iterate(const Product<float>&, int64_t, float*, const PowerIteration&);
template Eigenpair iterate(const Product<double>&, int64_t, double*, const PowerIteration&);

}  // namespace kfac
