// Covariances of layer inputs and output gradients: out <- decay out + scale sum over samples and positions of a a^T.
#pragma once

#include <array>
#include <memory>
#include <vector>

#include "kfac/types.h"

namespace kfac {

// A 2-D convolution over images [samples, channels, height, width]; a matrix [rows, d] is rows images of 1 x 1 pixels.
struct ConvShape {
  int64_t samples, channels, height, width;
  int64_t kernel_h = 1, kernel_w = 1;
  int64_t stride_h = 1, stride_w = 1;
  int64_t pad_top = 0, pad_left = 0;
  int64_t dilation_h = 1, dilation_w = 1;
  int64_t out_h = 1, out_w = 1;
  int64_t groups = 1;

  int64_t group_channels() const { return channels / groups; }
  int64_t taps() const { return kernel_h * kernel_w; }
  int64_t patch_size() const { return group_channels() * taps(); }
};

// The same patches, with stride 1 along an axis that has one output and dilation 1 along one that has one kernel
// position. Throws std::invalid_argument, naming the number, where a number is out of range or where products that
// kernels count with would overflow.
ConvShape checked_shape(const ConvShape& shape);

struct ImageView {
  const void* data;  // [N, C, H, W]
  DType dtype;
  int64_t stride_n, stride_c, stride_h, stride_w;  // in elements
};

enum class CovarianceMode : int { kExpand = 0, kReduce = 1 };

// kShift multiplies the image with its shifted self, kPatches gathers patches first; kAuto takes the cheaper one.
enum class CovarianceAlgorithm : int { kAuto = 0, kShift = 1, kPatches = 2 };

// out [groups, d, d], d = patch_size() + bias: float, or double when `image` is.
// A patch a lists (channel, kernel row, kernel column), then 1 if `bias`. kReduce averages a over positions first.
// `scale` multiplies the plain sum; decay 0 overwrites `out`, whatever it holds. Where it throws, memory that is not
// there or an interrupt, `out` is as it was unless decay is 0. Throws std::invalid_argument where `out` overlaps the
// image.
void covariance_cpu(const ImageView& image, const ConvShape& shape, CovarianceMode mode, CovarianceAlgorithm algorithm,
                    bool bias, double decay, double scale, void* out, int threads);

// How often the two algorithms do what takes time, for one group. Shift: multiply-adds of a panel-wide vector, values
// packed, tiles of a region (calling the inner loop, turning the tile around), panel-wide vectors of a term or of the
// result. Patches: multiply-adds, values copied and gathered, tiles.
struct CovarianceWork {
  std::array<double, 4> shift;
  std::array<double, 3> patches;
};
CovarianceWork covariance_work(const ConvShape& shape);

// What each of them takes, in units of the first, on a processor with AVX-512 and on others: the fits to
// bench/results/crossover-amd-epyc-avx512-1t.json and -avx2-1t.json, rounded, as `python -m bench.crossover --fit
// <file>` prints them.
constexpr CovarianceWork kWideWeights = {{1, 0.79, 440, 12}, {1.2, 6.4, 1800}};
constexpr CovarianceWork kNarrowWeights = {{1, 0.85, 660, 11}, {1.2, 4.8, 3200}};

// Those of the instruction set in use.
const CovarianceWork& covariance_weights();

// Predicted costs: work times weights.
struct CovarianceCosts {
  double shift, patches;
};
CovarianceCosts covariance_costs(const ConvShape& shape);

// What kAuto chooses for this shape.
CovarianceAlgorithm covariance_algorithm(const ConvShape& shape);

// ---- the shift structure -------------------------------------------------------------------------------------------
//
// Entry ((c, p), (c', q)) of the patch covariance, p and q kernel positions, is a sum over pixels u of x[c, u] x[c', u
// + s] with s = dilation (q - p): up to borders it depends on q - p (and, with a stride, on the phase of u) only. So a
// few sums over rectangles of pixels, each a [C, C] matrix, make up all of it; s and -s share one by transposition.

// Sum over u = (y0 + stride_h i, x0 + stride_w j), i < ny, j < nx, of x[:, u] x[:, u + (shift_y, shift_x)]^T.
struct Region {
  int64_t y0, ny, x0, nx, shift_y, shift_x;
  bool symmetric() const { return shift_y == 0 && shift_x == 0; }
};

struct Term {
  int region;
  bool transposed;
};

struct ShiftPlan {
  std::vector<Region> regions;
  std::vector<Term> terms;
  std::vector<int64_t> first_term;  // [taps * taps + 1]: block (p, q) is the sum of terms first_term[p taps + q] up to
                                    // the next entry
};

// The plan of this geometry, kept until others that were asked for since take a few megabytes.
std::shared_ptr<const ShiftPlan> shift_plan(const ConvShape& shape);

// Whether that plan is small enough to be worth its memory: it grows with the fourth to sixth power of the kernel's
// size.
bool has_small_plan(const ConvShape& shape);

// The pixels that each kernel position meets, [taps]: what there is of the plan without sharing any.
std::vector<Region> tap_windows(const ConvShape& shape);

struct PlanCache {
  int64_t plans, bytes;
};
PlanCache plan_cache();

}  // namespace kfac
