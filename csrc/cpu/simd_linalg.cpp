// Inner loops of power iteration, inverses and saliency, compiled once per instruction set; the rules are those of
// simd_kernels.cpp.
#include "kfac/simd_linalg.h"

#include "simd_vector.h"

namespace kfac {
namespace KFAC_SIMD {
namespace {

// ---- products of a matrix and a vector ----

// W vectors of columns; narrow ones take several rows at a time so that there are always kSums sums.
template <class T, int W>
KFAC_INLINE void left_product_columns(int64_t rows, const T* a, int64_t stride, const T* v, T* y) {
  using V = typename Vector<T>::type;
  constexpr int kLanes = Vector<T>::kLanes, kRows = kSums / W;
  V sum[kRows][W] = {};
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows, a += kRows * stride) {
    for (int r = 0; r < kRows; ++r) {
      for (int w = 0; w < W; ++w) sum[r][w] += v[i + r] * load(a + r * stride + w * kLanes);
    }
  }
  for (; i < rows; ++i, a += stride) {
    for (int w = 0; w < W; ++w) sum[0][w] += v[i] * load(a + w * kLanes);
  }
  for (int w = 0; w < W; ++w) {
    for (int r = 1; r < kRows; ++r) sum[0][w] += sum[r][w];
    store(y + w * kLanes, sum[0][w]);
  }
}

template <class T>
void left_product(int64_t rows, int64_t columns, const T* a, int64_t stride, const T* v, T* y) {
  constexpr int kLanes = Vector<T>::kLanes;
  int64_t j = 0;
  for (; j + 8 * kLanes <= columns; j += 8 * kLanes) left_product_columns<T, 8>(rows, a + j, stride, v, y + j);
  for (; j + 4 * kLanes <= columns; j += 4 * kLanes) left_product_columns<T, 4>(rows, a + j, stride, v, y + j);
  for (; j + 2 * kLanes <= columns; j += 2 * kLanes) left_product_columns<T, 2>(rows, a + j, stride, v, y + j);
  for (; j < columns; j += kLanes) left_product_columns<T, 1>(rows, a + j, stride, v, y + j);
}

// R rows of the lower triangle whose diagonal block, at column `block`, is `diagonal`.
template <class T, int R>
KFAC_INLINE void lower_product_rows(int64_t block, const T* a, int64_t stride, const T* diagonal,
                                    int64_t diagonal_stride, const T* v, const T* v_rows, T* y, T* y_rows) {
  using V = typename Vector<T>::type;
  constexpr int kLanes = Vector<T>::kLanes;
  V sum[R] = {}, factor[R];
  for (int r = 0; r < R; ++r) factor[r] = V{} + v_rows[r];
  for (int64_t j = 0; j < block; j += kLanes) {
    const V vj = load(v + j);
    V even = load(y + j), odd = {};  // two chains: their additions overlap
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(a + (r + R) * stride + j);  // the hardware follows rows to their end, not to the next ones
      V entry = load(a + r * stride + j);
      in_register(entry);
      sum[r] += entry * vj;
      (r % 2 ? odd : even) += factor[r] * entry;
    }
    store(y + j, even + odd);
  }
  for (int j = 0; j < kPanel; j += kLanes) {
    for (int r = 0; r < R; ++r) sum[r] += load(diagonal + r * diagonal_stride + j) * load(v + block + j);
  }
  for (int r = 0; r < R; ++r) y_rows[r] += lane_sum(reinterpret_cast<const T*>(&sum[r]));
}

template <class T>
void lower_product(int64_t first, int64_t last, int64_t n, const T* a, int64_t stride, const T* corner, const T* v,
                   T* y) {
  for (int64_t i = first; i < last;) {
    const int64_t block = i / kPanel * kPanel, left = last - i;
    const bool at_corner = block + kPanel > n;
    const T* row = a + i * stride;
    const T* diagonal = at_corner ? corner + (i - block) * kPanel : row + block;
    const int64_t diagonal_stride = at_corner ? kPanel : stride;
    if (left >= 8) {
      lower_product_rows<T, 8>(block, row, stride, diagonal, diagonal_stride, v, v + i, y, y + i);
      i += 8;
    } else if (left >= 4) {
      lower_product_rows<T, 4>(block, row, stride, diagonal, diagonal_stride, v, v + i, y, y + i);
      i += 4;
    } else {
      lower_product_rows<T, 1>(block, row, stride, diagonal, diagonal_stride, v, v + i, y, y + i);
      i += 1;
    }
  }
}

// Sum of term(i) for i < n, in double, with enough chains to hide the additions' latency.
template <class Term>
KFAC_INLINE double sum_double(int64_t n, Term term) {
  constexpr int kWidth = 32;
  double sum[kWidth] = {};
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    for (int k = 0; k < kWidth; ++k) sum[k] += term(i + k);
  }
  for (; i < n; ++i) sum[0] += term(i);
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) sum[k] += sum[k + half];
  }
  return sum[0];
}

template <class T>
void rayleigh(int64_t n, const double* y, const T* v, double* out) {
  const double value = sum_double(n, [=](int64_t i) { return double(v[i]) * y[i]; });
  out[0] = value;
  out[1] = sum_double(n, [=](int64_t i) { return y[i] * y[i]; });
  out[2] = sum_double(n, [=](int64_t i) {
    const double difference = y[i] - value * double(v[i]);
    return difference * difference;
  });
}

template <class T, int R>
KFAC_INLINE void row_products_of(int64_t columns, const T* x, int64_t stride, const T* v, T* t, T* w) {
  using V = typename Vector<T>::type;
  constexpr int kLanes = Vector<T>::kLanes;
  V sum[R] = {};
  for (int64_t j = 0; j < columns; j += kLanes) {
    const V vj = load(v + j);
    for (int r = 0; r < R; ++r) sum[r] += load(x + r * stride + j) * vj;
  }
  for (int r = 0; r < R; ++r) t[r] += lane_sum(reinterpret_cast<const T*>(&sum[r]));
  for (int64_t j = 0; j < columns; j += kLanes) {
    V even = load(w + j), odd = {};
    for (int r = 0; r < R; ++r) (r % 2 ? odd : even) += t[r] * load(x + r * stride + j);
    store(w + j, even + odd);
  }
}

template <class T>
void row_products(int rows, int64_t columns, const T* x, int64_t stride, const T* v, T* t, T* w) {
  if (rows == kRowBlock) return row_products_of<T, kRowBlock>(columns, x, stride, v, t, w);
  for (int r = 0; r < rows; ++r) row_products_of<T, 1>(columns, x + r * stride, stride, v, t + r, w);
}

// ---- products of a convolution and one filter ----

template <class T, int W>
KFAC_INLINE void filter_positions(int64_t taps, const int64_t* offsets, const T* base, const T* v, T start, T* u) {
  using V = typename Vector<T>::type;
  constexpr int kLanes = Vector<T>::kLanes;
  V sum[W];
  for (int w = 0; w < W; ++w) sum[w] = V{} + start;
  for (int64_t k = 0; k < taps; ++k) {
    const T* from = base + offsets[k];
    for (int w = 0; w < W; ++w) sum[w] += v[k] * load(from + w * kLanes);
  }
  for (int w = 0; w < W; ++w) store(u + w * kLanes, sum[w]);
}

template <class T>
void filter(int64_t taps, const int64_t* offsets, const T* base, const T* v, T start, int64_t count, T* u) {
  constexpr int kLanes = Vector<T>::kLanes;
  int64_t p = 0;
  for (; p + kSums * kLanes <= count; p += kSums * kLanes) {
    filter_positions<T, kSums>(taps, offsets, base + p, v, start, u + p);
  }
  for (; p < count; p += kLanes) filter_positions<T, 1>(taps, offsets, base + p, v, start, u + p);
}

template <class T, int K>
KFAC_INLINE void filter_gradient_taps(const int64_t* offsets, const T* base, const T* u, int64_t count, T* w) {
  using V = typename Vector<T>::type;
  constexpr int kLanes = Vector<T>::kLanes;
  V sum[K] = {};
  for (int64_t p = 0; p < count; p += kLanes) {
    const V up = load(u + p);
    for (int k = 0; k < K; ++k) sum[k] += up * load(base + offsets[k] + p);
  }
  for (int k = 0; k < K; ++k) w[k] += lane_sum(reinterpret_cast<const T*>(&sum[k]));
}

template <class T>
void filter_gradient(int64_t taps, const int64_t* offsets, const T* base, const T* u, int64_t count, T* w) {
  int64_t k = 0;
  for (; k + kSums <= taps; k += kSums) filter_gradient_taps<T, kSums>(offsets + k, base, u, count, w + k);
  for (; k < taps; ++k) filter_gradient_taps<T, 1>(offsets + k, base, u, count, w + k);
}

// ---- small factorisations ----

KFAC_INLINE float root(float x) {
  return __builtin_sqrtf(x);
}
KFAC_INLINE double root(double x) {
  return __builtin_sqrt(x);
}

// Row operations that turn [-B | I] into [-L^T | L^-1].
template <class T>
int invert_factor(const T* s, T* l) {
  alignas(kVectorBytes) T rows[kPanel][2 * kPanel];  // local: the compiler sees that no two rows overlap
  for (int i = 0; i < kPanel; ++i) {
    for (int j = 0; j < kPanel; ++j) {
      rows[i][j] = s[i * kPanel + j];
      rows[i][kPanel + j] = T(i == j);
    }
  }
  for (int k = 0; k < kPanel; ++k) {
    const T pivot = -rows[k][k];
    if (!(pivot > 0 && pivot - pivot == 0)) return k + 1;
    const T scale = 1 / root(pivot);
    for (int j = 0; j < 2 * kPanel; ++j) rows[k][j] *= scale;
    for (int i = k + 1; i < kPanel; ++i) {
      const T factor = rows[k][i];  // -L[i][k]
      for (int j = 0; j < 2 * kPanel; ++j) rows[i][j] += factor * rows[k][j];
    }
  }
  for (int i = 0; i < kPanel; ++i) {
    for (int j = 0; j < kPanel; ++j) l[i * kPanel + j] = rows[i][kPanel + j];
  }
  return 0;
}

// Rows whose products are added up as T before they join the sum in double.
constexpr int64_t kLaneRows = 32;

template <class T, int N>
KFAC_INLINE void lane_dots_of(int64_t rows, const T* a, const T* b, int64_t b_stride, double* out) {
  using V = typename Vector<T>::type;
  constexpr int kLanes = Vector<T>::kLanes;
  for (int lane = 0; lane < kPanel; lane += kLanes) {
    V sum[N] = {};
    for (int64_t r = 0; r < rows; ++r) {
      const V ar = load(a + r * kPanel + lane);
      for (int n = 0; n < N; ++n) sum[n] += ar * load(b + n * b_stride + r * kPanel + lane);
    }
    for (int n = 0; n < N; ++n) {
      for (int k = 0; k < kLanes; ++k) out[n * kPanel + lane + k] += double(sum[n][k]);
    }
  }
}

template <class T>
void lane_dots(int64_t count, int64_t rows, const T* a, const T* b, int64_t b_stride, double* out) {
  for (int64_t i = 0; i < count * kPanel; ++i) out[i] = 0;
  for (int64_t r = 0; r < rows; r += kLaneRows) {
    const int64_t some = rows - r < kLaneRows ? rows - r : kLaneRows;
    const T* ar = a + r * kPanel;
    const T* br = b + r * kPanel;
    int64_t i = 0;
    for (; i + kSums <= count; i += kSums) {
      lane_dots_of<T, kSums>(some, ar, br + i * b_stride, b_stride, out + i * kPanel);
    }
    for (; i < count; ++i) lane_dots_of<T, 1>(some, ar, br + i * b_stride, b_stride, out + i * kPanel);
  }
}

struct Lanes {
  double* data;
  KFAC_INLINE double* operator()(int i, int j) const { return data + (i * (i + 1) / 2 + j) * kPanel; }
};

// target += sign a b, lane by lane
KFAC_INLINE void multiply_add(double sign, const double* a, const double* b, double* target) {
  for (int lane = 0; lane < kPanel; ++lane) target[lane] += sign * a[lane] * b[lane];
}

KFAC_INLINE void divide(double* target, const double* by) {
  for (int lane = 0; lane < kPanel; ++lane) target[lane] /= by[lane];
}

// B = L L^T in place
KFAC_INLINE void factor_lanes(int size, Lanes B, double* pivots) {
  for (int lane = 0; lane < kPanel; ++lane) pivots[lane] = __builtin_inf();
  for (int j = 0; j < size; ++j) {
    double* diagonal = B(j, j);
    for (int k = 0; k < j; ++k) multiply_add(-1, B(j, k), B(j, k), diagonal);
    for (int lane = 0; lane < kPanel; ++lane) {
      const double pivot = diagonal[lane];
      pivots[lane] = pivot > pivots[lane] || pivots[lane] != pivots[lane] ? pivots[lane] : pivot;  // keeps NaN
      diagonal[lane] = root(pivot > 0 ? pivot : 1.0);
    }
    for (int i = j + 1; i < size; ++i) {
      for (int k = 0; k < j; ++k) multiply_add(-1, B(i, k), B(j, k), B(i, j));
      divide(B(i, j), diagonal);
    }
  }
}

// tr(F B^-1) = tr(X F X^T), X = L^-1, row i of X from the rows of L: x_i = (e_i - sum over k < i of L_ik x_k) / L_ii
void lane_traces(int size, const double* F, double* B, double* out, double* pivots) {
  const Lanes L{B}, form{const_cast<double*>(F)};
  factor_lanes(size, L, pivots);
  for (int lane = 0; lane < kPanel; ++lane) out[lane] = 0;
  for (int i = 0; i < size; ++i) {
    for (int lane = 0; lane < kPanel; ++lane) L(i, i)[lane] = 1 / L(i, i)[lane];
    for (int j = 0; j < i; ++j) {  // row i of L becomes row i of X; X_ij needs L_ik with k >= j only
      double sum[kPanel] = {};
      for (int k = j; k < i; ++k) multiply_add(-1, L(i, k), L(k, j), sum);
      for (int lane = 0; lane < kPanel; ++lane) L(i, j)[lane] = sum[lane] * L(i, i)[lane];
    }
    for (int j = 0; j <= i; ++j) {  // out += x_i F x_i^T
      double sum[kPanel] = {};
      for (int k = 0; k < j; ++k) multiply_add(2, L(i, k), form(j, k), sum);
      multiply_add(1, L(i, j), form(j, j), sum);
      multiply_add(1, L(i, j), sum, out);
    }
  }
}

template <class T>
constexpr LinalgKernels<T> table() {
  return {left_product<T>, lower_product<T>,   rayleigh<T>,      row_products<T>,
          filter<T>,       filter_gradient<T>, invert_factor<T>, lane_dots<T>};
}

}  // namespace

extern const LinalgSimd kLinalgSimd;
const LinalgSimd kLinalgSimd = {table<float>(), table<double>(), lane_traces};

}  // namespace KFAC_SIMD
}  // namespace kfac
