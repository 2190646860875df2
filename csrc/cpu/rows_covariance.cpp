#include "rows_covariance.h"

#include "kfac/parallel.h"

namespace kfac {
namespace {

constexpr int64_t kAloneBytes = 256 << 10;   // packed rows of one thread: a part of its second-level cache
constexpr int64_t kTogetherBytes = 4 << 20;  // packed rows that all threads work on
constexpr int64_t kLeastRows = 512;          // a block of the result is read and written once for so many
constexpr int64_t kFewRows = 4096;           // more are better summed by every thread on its own, if d is small
constexpr int64_t kSmallResult = 768 << 10;  // bytes
constexpr int64_t kBlockPanels = 8;          // of a block of the result: its rows are written 512 bytes at a time
constexpr int64_t kBlockEdge = kBlockPanels * kPanel;

template <class T>
class RowsCovariance {
 public:
  RowsCovariance(const PanelSource<T>& source, bool bias, int threads)
      : source_(source),
        shape_(source.packed()),
        region_(shift_plan(shape_)->regions[0]),
        d_(shape_.channels + (bias ? 1 : 0)),
        panels_(source.panels()),
        block_(threads > 1 ? std::clamp<int64_t>(panels_ / (2 * threads), 1, kBlockPanels) : kBlockPanels),
        threads_(threads),
        columns_(bias ? panels_ * kPanel : 0, T(0)) {}

  void run(T decay, T scale, T* out) {
    const int64_t step = std::min(shape_.samples, samples_at_once());
    const int workers = int(std::min<int64_t>(threads_, panels_));
    scratch_size_ = source_.scratch_size();
    packed_.resize(source_.packed_size(step));
    scratch_.resize(elements<T>(Checked(int64_t(scratch_size_)) * workers));
    for (int64_t first = 0; first < shape_.samples; first += step) {
      const int64_t samples = std::min(step, shape_.samples - first);
      parallel_for(panels_, workers, [&](int64_t p, int worker) { pack(first, samples, p, worker); });
      const int64_t blocks = divide_up(panels_, block_);
      parallel_for(blocks * (blocks + 1) / 2, threads_, [&](int64_t task) {
        int64_t row = blocks - 1;  // those of equal size first, the odd ones at the end
        while (task > row) task -= row-- + 1;
        add_block(samples, row, task, first ? T(1) : decay, scale, out);
      });
    }
    if (!columns_.empty()) add_bias(decay, scale, out);
  }

 private:
  int64_t samples_at_once() const {
    const int64_t pixels = source_.order().pixels(), bytes = int64_t(source_.packed_size(1) * sizeof(T));
    // no more than a plain product and its quotient take beside the result, both of its size
    const int64_t plain = 2 * d_ * d_ * int64_t(sizeof(T));
    const int64_t most = std::clamp(plain, kAloneBytes, kTogetherBytes) / bytes, least = kAloneBytes / bytes;
    const int64_t wanted = threads_ > 1 ? most : std::min(most, std::max(least, divide_up(kLeastRows, pixels)));
    return std::max<int64_t>(1, wanted);
  }

  T* panel(int64_t number, int64_t samples) {
    return packed_.data() + number * source_.order().pixels() * samples * kPanel;
  }
  int channels_in(int64_t i) const { return int(std::min<int64_t>(kPanel, shape_.channels - i * kPanel)); }

  void pack(int64_t first, int64_t samples, int64_t p, int worker) {
    const PixelOrder& order = source_.order();
    source_.pack(first, samples, p, panel(p, samples), scratch_.data() + worker * scratch_size_);
    if (columns_.empty()) return;
    panel_kernels<T>().column_sums(order.runs(region_, samples), panel(p, samples) + order.start(region_, samples),
                                   columns_.data() + p * kPanel);
  }

  // The block of panels I and J <= I, and its mirror image.
  void add_block(int64_t samples, int64_t I, int64_t J, T decay, T scale, T* out) {
    const PixelOrder& order = source_.order();
    const PanelKernels<T>& kernels = panel_kernels<T>();
    const Runs runs = order.runs(region_, samples);
    const int64_t start = order.start(region_, samples);
    alignas(64) T sums[kBlockEdge * kBlockEdge], mirrored[kBlockEdge * kBlockEdge];
    T* const other = I == J ? sums : mirrored;
    for (int64_t i = I * block_; i < std::min(panels_, (I + 1) * block_); ++i) {
      for (int64_t j = J * block_; j < std::min(i + 1, (J + 1) * block_); ++j) {
        const int64_t y = (i - I * block_) * kPanel, x = (j - J * block_) * kPanel;
        T tile[kTile] = {};
        kernels.gram(runs, panel(i, samples) + start, panel(j, samples) + start, channels_in(i), tile);
        for (int64_t r = 0; r < kPanel; ++r) std::copy_n(tile + r * kPanel, kPanel, sums + (y + r) * kBlockEdge + x);
        if (i != j) kernels.transpose_tile(tile, other + x * kBlockEdge + y, kBlockEdge);
      }
    }
    write(sums, I, J, decay, scale, out);
    if (I != J) write(mirrored, J, I, decay, scale, out);
  }

  void write(const T* block, int64_t I, int64_t J, T decay, T scale, T* out) const {
    const int64_t edge = block_ * kPanel;
    const int rows = int(std::min(edge, shape_.channels - I * edge)),
              columns = int(std::min(edge, shape_.channels - J * edge));
    panel_kernels<T>().blend_tile(block, kBlockEdge, rows, columns, decay, scale, out + (I * d_ + J) * edge, d_);
  }

  // The last row and column: sums of the rows, and their number.
  void add_bias(T decay, T scale, T* out) const {
    const auto blend = [&](T old, T value) { return decay == 0 ? scale * value : decay * old + scale * value; };
    for (int64_t c = 0; c + 1 < d_; ++c) {
      for (T* entry : {out + c * d_ + d_ - 1, out + (d_ - 1) * d_ + c}) *entry = blend(*entry, columns_[c]);
    }
    out[d_ * d_ - 1] = blend(out[d_ * d_ - 1], T(shape_.samples * shape_.out_h * shape_.out_w));
  }

  const PanelSource<T>& source_;
  const ConvShape& shape_;
  const Region region_;
  const int64_t d_, panels_, block_;
  const int threads_;
  Buffer<T> columns_, packed_, scratch_;
  size_t scratch_size_ = 0;  // of each worker
};

}  // namespace

template <class T>
bool takes_rows(const PanelSource<T>& source, int threads) {
  const ConvShape& s = source.packed();
  if (s.taps() > 1 || s.groups > 1 || shift_plan(s)->regions.size() != 1) return false;
  const int64_t rows = (Checked(s.samples) * source.order().pixels()).value(), bytes = int64_t(sizeof(T)) * s.channels;
  return threads == 1 || bytes * s.channels / 2 > kSmallResult || (rows <= kFewRows && rows * bytes <= kTogetherBytes);
}

template <class T>
void rows_covariance(const PanelSource<T>& source, bool bias, double decay, double scale, T* out, int threads) {
  RowsCovariance<T>(source, bias, threads).run(T(decay), T(scale), out);
}

template bool takes_rows(const PanelSource<float>&, int);
template bool takes_rows(const PanelSource<double>&, int);
template void rows_covariance(const PanelSource<float>&, bool, double, double, float*, int);
template void rows_covariance(const PanelSource<double>&, bool, double, double, double*, int);

}  // namespace kfac
