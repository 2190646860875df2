// Power iteration on the covariance of a layer's inputs without forming it: one pass over the inputs an iteration.
#include <algorithm>

#include "buffer.h"
#include "kfac/checked.h"
#include "kfac/parallel.h"
#include "kfac/power_iteration.h"
#include "kfac/simd_linalg.h"
#include "panel_source.h"

namespace kfac {
namespace {

constexpr int64_t kShares = 16;             // sums added up in a fixed order, whoever has made them
constexpr int64_t kFlushBlocks = 32;        // blocks of rows summed as T before they join the sum in double
constexpr int64_t kPlaneBytes = 512 << 10;  // a chunk of an image: a part of the second-level cache

constexpr int64_t padded(int64_t n) {
  return divide_up(n, kPanel) * kPanel;
}

template <class T>
constexpr DType kDType = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;

template <class T>
void move_to(double* sums, int64_t n, Buffer<T>& total) {
  for (int64_t j = 0; j < n; ++j) sums[j] += total[j];
  std::fill(total.begin(), total.end(), T(0));
}

// image [n] <- scale times the sum over chunks of what sum_chunk(chunk, v, sums) adds to sums [n].
template <class T, class SumChunk>
void sum_chunks(int64_t chunks, int64_t n, double scale, int threads, const T* v, double* image, SumChunk sum_chunk) {
  const int64_t shares = std::min(chunks, kShares), size = padded(n);
  Buffer<double> sums(elements<double>(Checked(shares) * size), 0.0);
  parallel_for(shares, threads, [&](int64_t share) {
    sum_chunk(share * chunks / shares, (share + 1) * chunks / shares, v, sums.data() + share * size);
  });
  std::fill_n(image, n, 0.0);
  for (int64_t share = 0; share < shares; ++share) {
    for (int64_t j = 0; j < n; ++j) image[j] += sums[share * size + j];
  }
  for (int64_t j = 0; j < n; ++j) image[j] *= scale;
}

// ---- rows ----

template <class T>
class RowCovariance {
 public:
  RowCovariance(const void* x, DType dtype, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride,
                bool bias, int threads)
      : x_(static_cast<const char*>(x)),
        dtype_(dtype),
        rows_(rows),
        columns_(columns),
        row_stride_(row_stride),
        column_stride_(column_stride),
        bias_(bias),
        threads_(threads),
        direct_(dtype == kDType<T> && column_stride == 1 && columns % kPanel == 0) {}

  int64_t size() const { return columns_ + (bias_ ? 1 : 0); }

  void operator()(const T* v, double* image) const {
    Buffer<T> weights(padded(columns_), T(0));  // v without the bias
    std::copy_n(v, columns_, weights.data());
    const T bias = bias_ ? v[columns_] : T(0);
    sum_chunks(divide_up(rows_, kRowBlock), size(), 1.0 / double(rows_), threads_, v, image,
               [&](int64_t first, int64_t last, const T*, double* sums) {
                 sum_blocks(first, last, weights.data(), bias, sums);
               });
  }

 private:
  // Row blocks [first, last): sums += sum of (a.v) a
  void sum_blocks(int64_t first, int64_t last, const T* v, T bias, double* sums) const {
    const int64_t stride = padded(columns_);
    Buffer<T> copy(direct_ ? 0 : elements<T>(Checked(stride) * kRowBlock), T(0)), total(stride, T(0));
    for (int64_t block = first; block < last; ++block) {
      check_interrupt();
      const int64_t row = block * kRowBlock;
      const int count = static_cast<int>(std::min<int64_t>(kRowBlock, rows_ - row));
      if (!direct_) convert(row, count, stride, copy.data());
      const T* x = direct_ ? reinterpret_cast<const T*>(x_) + row * row_stride_ : copy.data();
      T products[kRowBlock];
      std::fill_n(products, kRowBlock, bias);
      linalg_kernels<T>().row_products(count, stride, x, direct_ ? row_stride_ : stride, v, products, total.data());
      if (bias_) {
        for (int r = 0; r < count; ++r) sums[columns_] += products[r];
      }
      if ((block - first) % kFlushBlocks == kFlushBlocks - 1 || block + 1 == last) move_to(sums, columns_, total);
    }
  }

  void convert(int64_t row, int count, int64_t stride, T* target) const {
    for (int r = 0; r < count; ++r) {
      panel_kernels<T>().convert(x_ + (row + r) * row_stride_ * element_size(dtype_), dtype_, columns_, column_stride_,
                                 target + r * stride);
    }
  }

  const char* x_;
  const DType dtype_;
  const int64_t rows_, columns_, row_stride_, column_stride_;
  const bool bias_;
  const int threads_;
  const bool direct_;
};

// ---- patches ----

// The rests by the stride that the kernel's positions along an axis have, each once.
class Phases {
 public:
  Phases(int64_t kernel, int64_t stride, int64_t dilation) : stride_(stride), dilation_(dilation) {
    for (int64_t k = 0; k < kernel; ++k) rests_.push_back(rest(k));
    std::sort(rests_.begin(), rests_.end());
    rests_.erase(std::unique(rests_.begin(), rests_.end()), rests_.end());
  }

  int64_t count() const { return int64_t(rests_.size()); }
  int64_t operator[](int64_t number) const { return rests_[number]; }
  int64_t number_of(int64_t k) const {
    return std::lower_bound(rests_.begin(), rests_.end(), rest(k)) - rests_.begin();
  }

 private:
  int64_t rest(int64_t k) const { return k * dilation_ % stride_; }

  int64_t stride_, dilation_;
  std::vector<int64_t> rests_;
};

// Pixels of a chunk, a plane a channel and phase (row mod stride, column mod stride): there every tap of the kernel is
// a constant offset, and all positions of all samples of the chunk are one contiguous run, some of them void.
struct Planes {
  int64_t samples, out_rows;  // of a chunk
  int64_t rows, pitch;        // of one sample's plane
  int64_t phase, channel;     // elements of a phase's and of a channel's planes

  Planes(const ConvShape& s, int64_t phases, int64_t samples, int64_t out_rows)
      : samples(samples),
        out_rows(out_rows),
        rows(out_rows + (s.kernel_h - 1) * s.dilation_h / s.stride_h),
        pitch(s.out_w + (s.kernel_w - 1) * s.dilation_w / s.stride_w),
        phase((Checked(samples) * rows * pitch).value()),
        channel((Checked(phases) * phase).value()) {}

  // From the first output position of the chunk to one beyond its last.
  int64_t positions(int64_t out_w) const { return ((samples - 1) * rows + out_rows - 1) * pitch + out_w; }
};

template <class T>
class PatchCovariance {
 public:
  PatchCovariance(const ImageView& image, const ConvShape& shape, bool bias, int threads)
      : image_(image),
        shape_(shape),
        bias_(bias),
        threads_(threads),
        rows_(shape.kernel_h, shape.stride_h, shape.dilation_h),
        columns_(shape.kernel_w, shape.stride_w, shape.dilation_w),
        planes_(largest_chunk(shape, rows_.count() * columns_.count())),
        bands_(divide_up(shape.out_h, planes_.out_rows)) {
    for (int64_t c = 0; c < shape.channels; ++c) {
      for (int64_t ky = 0; ky < shape.kernel_h; ++ky) {
        for (int64_t kx = 0; kx < shape.kernel_w; ++kx) offsets_.push_back(offset(c, ky, kx));
      }
    }
  }

  int64_t size() const { return shape_.patch_size() + (bias_ ? 1 : 0); }

  void operator()(const T* v, double* image) const {
    const int64_t chunks = divide_up(shape_.samples, planes_.samples) * bands_;
    const double positions = double(shape_.samples) * double(shape_.out_h * shape_.out_w);
    sum_chunks(
        chunks, size(), 1 / positions, threads_, v, image,
        [&](int64_t first, int64_t last, const T* filter, double* sums) { sum_range(first, last, filter, sums); });
  }

 private:
  // Many samples, or some rows of one.
  static Planes largest_chunk(const ConvShape& s, int64_t phases) {
    const auto bytes = [&](int64_t rows) {
      return int64_t(elements<T>(Checked(s.channels) * Planes(s, phases, 1, rows).channel) * sizeof(T));
    };
    const int64_t one = bytes(1), more = s.out_h > 1 ? bytes(2) - one : 1;
    // rows that the kernel reaches beyond an output are packed for every chunk: no more of them than of its own
    const int64_t reach = (s.kernel_h - 1) * s.dilation_h / s.stride_h, fitting = 1 + (kPlaneBytes - one) / more;
    const int64_t rows = std::clamp<int64_t>(std::max(fitting, reach), 1, s.out_h);
    if (rows < s.out_h) return Planes(s, phases, 1, rows);
    return Planes(s, phases, std::clamp<int64_t>(kPlaneBytes / bytes(rows), 1, s.samples), rows);
  }

  int64_t offset(int64_t c, int64_t ky, int64_t kx) const {
    const int64_t phase = rows_.number_of(ky) * columns_.count() + columns_.number_of(kx);
    return c * planes_.channel + phase * planes_.phase + ky * shape_.dilation_h / shape_.stride_h * planes_.pitch +
           kx * shape_.dilation_w / shape_.stride_w;
  }

  // Chunks [first, last): sums += sum over positions of (a.v) a
  void sum_range(int64_t first, int64_t last, const T* v, double* sums) const {
    const int64_t positions = padded(planes_.positions(shape_.out_w)), taps = shape_.patch_size();
    // Loads run over all positions from each tap's offset, beyond the last plane too.
    const int64_t farthest = *std::max_element(offsets_.begin(), offsets_.end());
    Buffer<T> planes(elements<T>(Checked(farthest) + planes_.phase + positions), T(0));
    Buffer<T> products(positions), total(taps, T(0));
    const LinalgKernels<T>& kernels = linalg_kernels<T>();
    for (int64_t chunk = first; chunk < last; ++chunk) {
      check_interrupt();
      const int64_t sample = chunk / bands_ * planes_.samples, row = chunk % bands_ * planes_.out_rows;
      pack(sample, row, planes.data());
      kernels.filter(taps, offsets_.data(), planes.data(), v, bias_ ? v[taps] : T(0), positions, products.data());
      keep_positions(sample, row, products);
      kernels.filter_gradient(taps, offsets_.data(), planes.data(), products.data(), positions, total.data());
      move_to(sums, taps, total);
      if (bias_) {
        for (const T product : products) sums[taps] += product;
      }
    }
  }

  // Zeroes the products at void positions.
  void keep_positions(int64_t sample, int64_t row, Buffer<T>& products) const {
    const int64_t samples = std::min(planes_.samples, shape_.samples - sample);
    const int64_t rows = std::min(planes_.out_rows, shape_.out_h - row);
    T* line = products.data();
    T* const end = line + products.size();
    for (int64_t n = 0; n < planes_.samples; ++n) {
      for (int64_t y = 0; y < planes_.rows && line < end; ++y, line += planes_.pitch) {
        std::fill(std::min(end, line + (n < samples && y < rows ? shape_.out_w : 0)),
                  std::min(end, line + planes_.pitch), T(0));
      }
    }
    if (line < end) std::fill(line, end, T(0));
  }

  void pack(int64_t sample, int64_t row, T* planes) const {
    for (int64_t c = 0; c < shape_.channels; ++c) {
      for (int64_t y = 0; y < rows_.count(); ++y) {
        for (int64_t x = 0; x < columns_.count(); ++x, planes += planes_.phase) {
          pack_phase(sample, row, c, rows_[y], columns_[x], planes);
        }
      }
    }
  }

  void pack_phase(int64_t sample, int64_t row, int64_t c, int64_t phase_y, int64_t phase_x, T* plane) const {
    const ConvShape& s = shape_;
    // columns x of the plane with 0 <= x stride_w + left < width
    const int64_t left = phase_x - s.pad_left;
    const int64_t begin = left < 0 ? divide_up(-left, s.stride_w) : 0;
    const int64_t end = std::min(planes_.pitch, divide_up(std::max<int64_t>(0, s.width - left), s.stride_w));
    std::fill_n(plane, planes_.phase, T(0));
    if (begin >= end) return;
    const int64_t samples = std::min(planes_.samples, s.samples - sample);
    for (int64_t n = 0; n < samples; ++n) {
      for (int64_t y = 0; y < planes_.rows; ++y) {
        const int64_t from = (row + y) * s.stride_h + phase_y - s.pad_top;
        if (from < 0 || from >= s.height) continue;
        const int64_t at = (sample + n) * image_.stride_n + c * image_.stride_c + from * image_.stride_h +
                           (begin * s.stride_w + left) * image_.stride_w;
        panel_kernels<T>().convert(static_cast<const char*>(image_.data) + at * element_size(image_.dtype),
                                   image_.dtype, end - begin, s.stride_w * image_.stride_w,
                                   plane + (n * planes_.rows + y) * planes_.pitch + begin);
      }
    }
  }

  const ImageView image_;
  const ConvShape shape_;
  const bool bias_;
  const int threads_;
  const Phases rows_, columns_;
  const Planes planes_;
  const int64_t bands_;
  std::vector<int64_t> offsets_;
};

template <class T, class Covariance>
Eigenpair solve(const Covariance& covariance, void* vector, const PowerIteration& method) {
  return iterate<T>(std::cref(covariance), covariance.size(), static_cast<T*>(vector), method);
}

}  // namespace

Eigenpair row_covariance_power_iteration_cpu(const void* x, DType dtype, int64_t rows, int64_t columns,
                                             int64_t row_stride, int64_t column_stride, bool bias, void* vector,
                                             const PowerIteration& method, int threads) {
  check_range("rows of the input", rows, 1, kMaxCount);
  check_range("columns of the input", columns, 1, kMaxRows);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const RowCovariance<T> covariance(x, dtype, rows, columns, row_stride, column_stride, bias, threads);
    return solve<T>(covariance, vector, method);
  };
  return dtype == DType::kFloat64 ? run(double()) : run(float());
}

Eigenpair patch_covariance_power_iteration_cpu(const ImageView& image, const ConvShape& shape, bool bias, void* vector,
                                               const PowerIteration& method, int threads) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    return solve<T>(PatchCovariance<T>(image, checked_shape(shape), bias, threads), vector, method);
  };
  return image.dtype == DType::kFloat64 ? run(double()) : run(float());
}

}  // namespace kfac
