// Inner loops of greedy selection, compiled once per instruction set; the rules are those of simd_kernels.cpp.
#include "kfac/simd_greedy.h"

#include "simd_vector.h"

namespace kfac {
namespace KFAC_SIMD {
namespace {

constexpr int kRowsTogether = 4;  // K: rows that are read while a vector of each sum is in a register
constexpr int64_t kOutsTogether = 12;

// I sums over K rows. The factors stay in registers, the rows and sums in the first cache; the rows `next` are fetched,
// which lie far apart: the hardware follows each one to its end only.
template <class T, int I, int K>
KFAC_INLINE void add_few(int64_t columns, const T* factors, int64_t factor_stride, const T* const* rows,
                         const T* const* next, T* out, int64_t out_stride) {
  using V = typename Vector<T>::type;
  constexpr int kLanes = Vector<T>::kLanes;
  V factor[I][K];
  const T *from[K], *ahead[K];  // local: no store into `out` can change them
  for (int k = 0; k < K; ++k) {
    from[k] = rows[k];
    ahead[k] = next[k];
    for (int i = 0; i < I; ++i) factor[i][k] = V{} + factors[k * factor_stride + i];
  }
  int64_t c = 0;
  for (; c + kLanes <= columns; c += kLanes) {
    V row[K];
    for (int k = 0; k < K; ++k) {
      row[k] = load(from[k] + c);
      __builtin_prefetch(ahead[k] + c);
    }
    for (int i = 0; i < I; ++i) {
      V sum = load(out + i * out_stride + c);
      for (int k = 0; k < K; ++k) sum += factor[i][k] * row[k];
      store(out + i * out_stride + c, sum);
    }
  }
  for (; c < columns; ++c) {
    for (int i = 0; i < I; ++i) {
      T sum = out[i * out_stride + c];
      for (int k = 0; k < K; ++k) sum += factors[k * factor_stride + i] * from[k][c];
      out[i * out_stride + c] = sum;
    }
  }
}

template <class T, int K>
KFAC_INLINE void add_some(int64_t outs, int64_t columns, const T* factors, int64_t factor_stride, const T* const* rows,
                          const T* const* next, T* out, int64_t out_stride) {
  int64_t i = 0;
  for (; outs - i >= 3 && outs - i != 4; i += 3) {
    add_few<T, 3, K>(columns, factors + i, factor_stride, rows, next, out + i * out_stride, out_stride);
  }
  for (; outs - i >= 2; i += 2) {
    add_few<T, 2, K>(columns, factors + i, factor_stride, rows, next, out + i * out_stride, out_stride);
  }
  if (i < outs) add_few<T, 1, K>(columns, factors + i, factor_stride, rows, next, out + i * out_stride, out_stride);
}

template <class T>
void add_rows(int64_t outs, int64_t count, int64_t columns, const T* factors, const T* const* rows, T* out,
              int64_t out_stride) {
  for (int64_t i = 0; i < outs; i += kOutsTogether) {
    const int64_t some = outs - i < kOutsTogether ? outs - i : kOutsTogether;
    T* const to = out + i * out_stride;
    int64_t k = 0;
    for (; k + kRowsTogether <= count; k += kRowsTogether) {
      const T* const* next = rows + (k + 2 * kRowsTogether <= count ? k + kRowsTogether : k);
      add_some<T, kRowsTogether>(some, columns, factors + k * outs + i, outs, rows + k, next, to, out_stride);
    }
    for (; k < count; ++k)
      add_some<T, 1>(some, columns, factors + k * outs + i, outs, rows + k, rows + k, to, out_stride);
  }
}

void lane_updates(int size, int64_t ranks, const double* x, const double* y, double* B, double* F) {
  using V = typename Vector<double>::type;
  constexpr int kLanes = Vector<double>::kLanes;
  for (int a = 0; a < size; ++a) {
    for (int b = 0; b <= a; ++b, B += kPanel, F += kPanel) {
      for (int lane = 0; lane < kPanel; lane += kLanes) {
        V block = load(B + lane), form = load(F + lane);
        for (int64_t r = 0; r < ranks; ++r) {
          const int64_t at = (r * size + a) * kPanel + lane, beside = (r * size + b) * kPanel + lane;
          const V xa = load(x + at), xb = load(x + beside);
          block -= xa * xb;
          form -= load(y + at) * xb + xa * load(y + beside);
        }
        store(B + lane, block);
        store(F + lane, form);
      }
    }
  }
}

}  // namespace

extern const GreedySimd kGreedySimd;
const GreedySimd kGreedySimd = {{add_rows<float>}, {add_rows<double>}, lane_updates};

}  // namespace KFAC_SIMD
}  // namespace kfac
