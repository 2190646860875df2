#include <algorithm>
#include <array>
#include <iterator>
#include <map>
#include <mutex>
#include <set>
#include <tuple>

#include "kfac/covariance.h"

namespace kfac {
namespace {

struct Interval {  // pixels first, first + stride, ...
  int64_t first = 0, count = 0;
};

// One axis of the convolution.
struct Axis {
  int64_t size, kernel, stride, pad, dilation, out;

  int64_t offset(int64_t p) const { return p * dilation - pad; }
  int64_t phase(int64_t p) const { return ((offset(p) % stride) + stride) % stride; }

  // Pixels u that kernel position p meets while u + dilation (q - p) is a pixel too.
  Interval window(int64_t p, int64_t q) const {
    const int64_t low = std::min(offset(p), offset(q)), high = std::max(offset(p), offset(q));
    const int64_t begin = low < 0 ? divide_up(-low, stride) : 0;
    const int64_t end = high < size ? std::min(out, (size - 1 - high) / stride + 1) : 0;
    return {begin * stride + offset(p), std::max<int64_t>(0, end - begin)};
  }

  // The window cut wherever a window with the same shift and phase begins or ends: pieces that windows share whole.
  std::vector<Interval> pieces(int64_t p, int64_t q) const {
    std::set<int64_t> cuts;
    for (int64_t p2 = 0; p2 < kernel; ++p2) {
      const int64_t q2 = p2 + q - p;
      if (q2 < 0 || q2 >= kernel || phase(p2) != phase(p)) continue;
      const Interval pixels = window(p2, q2);
      if (pixels.count) cuts.insert({pixels.first, pixels.first + pixels.count * stride});
    }
    const Interval mine = window(p, q);
    const int64_t end = mine.first + mine.count * stride;
    std::vector<Interval> result;
    for (auto cut = cuts.begin(); cut != cuts.end(); ++cut) {
      if (*cut >= mine.first && *cut < end) result.push_back({*cut, (*std::next(cut) - *cut) / stride});
    }
    return result;
  }
};

using RegionKey = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;

// The number of a region in the plan, and whether it stands there with the roles of u and u + s exchanged.
class RegionTable {
 public:
  explicit RegionTable(std::vector<Region>& regions) : regions_(regions) {}

  Term term(Region region) {
    const bool transposed = std::tie(region.shift_y, region.shift_x) < std::make_tuple<int64_t, int64_t>(0, 0);
    if (transposed) {
      region = {region.y0 + region.shift_y,
                region.ny,
                region.x0 + region.shift_x,
                region.nx,
                -region.shift_y,
                -region.shift_x};
    }
    const RegionKey key{region.y0, region.ny, region.x0, region.nx, region.shift_y, region.shift_x};
    const auto [found, added] = numbers_.emplace(key, static_cast<int>(regions_.size()));
    if (added) regions_.push_back(region);
    return {found->second, transposed};
  }

 private:
  std::vector<Region>& regions_;
  std::map<RegionKey, int> numbers_;
};

ShiftPlan build_plan(const ConvShape& shape) {
  const Axis vertical{shape.height, shape.kernel_h, shape.stride_h, shape.pad_top, shape.dilation_h, shape.out_h};
  const Axis horizontal{shape.width, shape.kernel_w, shape.stride_w, shape.pad_left, shape.dilation_w, shape.out_w};
  ShiftPlan plan;
  RegionTable table(plan.regions);
  const int64_t kw = shape.kernel_w, taps = shape.taps();
  for (int64_t p = 0; p < taps; ++p) {
    for (int64_t q = 0; q < taps; ++q) {
      plan.first_term.push_back(int64_t(plan.terms.size()));
      const int64_t shift_y = (q / kw - p / kw) * shape.dilation_h, shift_x = (q % kw - p % kw) * shape.dilation_w;
      for (const Interval& y : vertical.pieces(p / kw, q / kw)) {
        for (const Interval& x : horizontal.pieces(p % kw, q % kw)) {
          plan.terms.push_back(table.term({y.first, y.count, x.first, x.count, shift_y, shift_x}));
        }
      }
    }
  }
  plan.first_term.push_back(int64_t(plan.terms.size()));
  return plan;
}

}  // namespace

const ShiftPlan& shift_plan(const ConvShape& shape) {
  using Key = std::array<int64_t, 12>;  // a plan does not depend on samples, channels and groups
  static std::map<Key, ShiftPlan> plans;
  static std::mutex mutex;
  const Key key{shape.height,  shape.width,    shape.kernel_h,   shape.kernel_w,   shape.stride_h, shape.stride_w,
                shape.pad_top, shape.pad_left, shape.dilation_h, shape.dilation_w, shape.out_h,    shape.out_w};
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = plans.find(key);
  if (found == plans.end()) found = plans.emplace(key, build_plan(shape)).first;
  return found->second;
}

}  // namespace kfac
