#include <pthread.h>

#include <algorithm>
#include <array>
#include <list>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>

#include "kfac/checked.h"
#include "kfac/covariance.h"
#include "kfac/parallel.h"

namespace kfac {
namespace {

constexpr int64_t kCacheBytes = 4 << 20;  // hundreds of plans of 3 x 3 kernels
constexpr int64_t kFewTaps = 36;          // the plan of so many is small whatever the rest is
constexpr int64_t kMostTaps = 1024;
constexpr int64_t kMostTerms = 1 << 20;

struct Interval {  // pixels first, first + stride, ...
  int64_t first = 0, count = 0;
};

// One axis of the convolution.
class Axis {
 public:
  Axis(int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation, int64_t out)
      : size_(size), kernel_(kernel), stride_(stride), pad_(pad), dilation_(dilation), out_(out) {}

  // Wherever a window with this shift and phase begins or ends, in order: between them lie pieces that windows share.
  void find_cuts() {
    for (int64_t p = 0; p < kernel_; ++p) {
      for (int64_t q = 0; q < kernel_; ++q) {
        const Interval pixels = window(p, q);
        if (!pixels.count) continue;
        std::vector<int64_t>& cuts = cuts_[{q - p, phase(p)}];
        cuts.insert(cuts.end(), {pixels.first, pixels.first + pixels.count * stride_});
      }
    }
    for (auto& [key, cuts] : cuts_) {
      std::sort(cuts.begin(), cuts.end());
      cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
    }
  }

  // Pixels u that kernel position p meets while u + dilation (q - p) is a pixel too.
  Interval window(int64_t p, int64_t q) const {
    const int64_t low = std::min(offset(p), offset(q)), high = std::max(offset(p), offset(q));
    const int64_t begin = low < 0 ? divide_up(-low, stride_) : 0;
    const int64_t end = high < size_ ? std::min(out_, (size_ - 1 - high) / stride_ + 1) : 0;
    return {begin * stride_ + offset(p), std::max<int64_t>(0, end - begin)};
  }

  // The window in pieces.
  std::vector<Interval> pieces(int64_t p, int64_t q) const {
    std::vector<Interval> result;
    const auto [first, last] = cuts_of(p, q);
    for (auto cut = first; cut != last; ++cut) result.push_back({*cut, (cut[1] - *cut) / stride_});
    return result;
  }

  // Of all windows together.
  int64_t piece_count() const {
    int64_t count = 0;
    for (int64_t p = 0; p < kernel_; ++p) {
      for (int64_t q = 0; q < kernel_; ++q) {
        const auto [first, last] = cuts_of(p, q);
        count += last - first;
      }
    }
    return count;
  }

 private:
  using Cuts = std::vector<int64_t>;

  int64_t offset(int64_t p) const { return p * dilation_ - pad_; }
  int64_t phase(int64_t p) const { return ((offset(p) % stride_) + stride_) % stride_; }

  // The cuts at which a piece of the window begins; the cut after the last of them is there too.
  std::pair<Cuts::const_iterator, Cuts::const_iterator> cuts_of(int64_t p, int64_t q) const {
    const Interval mine = window(p, q);
    const auto found = cuts_.find({q - p, phase(p)});
    if (!mine.count || found == cuts_.end()) return {};
    const Cuts& cuts = found->second;
    return {std::lower_bound(cuts.begin(), cuts.end(), mine.first),
            std::lower_bound(cuts.begin(), cuts.end(), mine.first + mine.count * stride_)};
  }

  int64_t size_, kernel_, stride_, pad_, dilation_, out_;
  std::map<std::pair<int64_t, int64_t>, Cuts> cuts_;
};

Axis vertical_axis(const ConvShape& s) {
  return {s.height, s.kernel_h, s.stride_h, s.pad_top, s.dilation_h, s.out_h};
}

Axis horizontal_axis(const ConvShape& s) {
  return {s.width, s.kernel_w, s.stride_w, s.pad_left, s.dilation_w, s.out_w};
}

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
  Axis vertical = vertical_axis(shape), horizontal = horizontal_axis(shape);
  vertical.find_cuts();
  horizontal.find_cuts();
  ShiftPlan plan;
  RegionTable table(plan.regions);
  const int64_t kw = shape.kernel_w, taps = shape.taps();
  plan.first_term.reserve(elements<int64_t>(Checked(taps) * taps + 1));
  for (int64_t p = 0; p < taps; ++p) {
    check_interrupt();
    for (int64_t q = 0; q < taps; ++q) {
      plan.first_term.push_back(int64_t(plan.terms.size()));
      const int64_t shift_y = (q / kw - p / kw) * shape.dilation_h, shift_x = (q % kw - p % kw) * shape.dilation_w;
      const std::vector<Interval> columns = horizontal.pieces(p % kw, q % kw);
      for (const Interval& y : vertical.pieces(p / kw, q / kw)) {
        for (const Interval& x : columns) {
          plan.terms.push_back(table.term({y.first, y.count, x.first, x.count, shift_y, shift_x}));
        }
      }
    }
  }
  plan.first_term.push_back(int64_t(plan.terms.size()));
  plan.regions.shrink_to_fit();
  plan.terms.shrink_to_fit();
  return plan;
}

int64_t bytes_of(const ShiftPlan& plan) {
  return int64_t(plan.regions.size() * sizeof(Region) + plan.terms.size() * sizeof(Term) +
                 plan.first_term.size() * sizeof(int64_t));
}

// Plans by their geometry, the one used last in front.
class Cache {
 public:
  // a plan does not depend on samples, channels and groups
  using Key = std::array<int64_t, 12>;
  using Plan = std::shared_ptr<const ShiftPlan>;

  Plan find(const Key& key) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found =
        std::find_if(plans_.begin(), plans_.end(), [&](const auto& entry) { return entry.first == key; });
    if (found == plans_.end()) return nullptr;
    plans_.splice(plans_.begin(), plans_, found);
    return found->second;
  }

  void add(const Key& key, const Plan& plan) {
    const std::lock_guard<std::mutex> lock(mutex_);
    plans_.emplace_front(key, plan);
    bytes_ += bytes_of(*plan);
    while (bytes_ > kCacheBytes && plans_.size() > 1) {
      bytes_ -= bytes_of(*plans_.back().second);
      plans_.pop_back();
    }
  }

  PlanCache state() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return {int64_t(plans_.size()), bytes_};
  }

  // A fork waits for who is in here, so that no child finds the door locked by a thread that it has not.
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  std::list<std::pair<Key, Plan>> plans_;
  int64_t bytes_ = 0;
  std::mutex mutex_;
};

Cache cache;
const int watching_forks = pthread_atfork([] { cache.lock(); }, [] { cache.unlock(); }, [] { cache.unlock(); });

}  // namespace

std::shared_ptr<const ShiftPlan> shift_plan(const ConvShape& shape) {
  const Cache::Key key{shape.height,     shape.width,      shape.kernel_h, shape.kernel_w,
                       shape.stride_h,   shape.stride_w,   shape.pad_top,  shape.pad_left,
                       shape.dilation_h, shape.dilation_w, shape.out_h,    shape.out_w};
  if (Cache::Plan found = cache.find(key)) return found;
  auto made = std::make_shared<const ShiftPlan>(build_plan(shape));
  cache.add(key, made);
  return made;
}

PlanCache plan_cache() {
  return cache.state();
}

bool has_small_plan(const ConvShape& shape) {
  if (shape.taps() <= kFewTaps) return true;
  if (shape.taps() > kMostTaps) return false;
  Axis vertical = vertical_axis(shape), horizontal = horizontal_axis(shape);
  vertical.find_cuts();
  horizontal.find_cuts();
  return vertical.piece_count() * horizontal.piece_count() <= kMostTerms;
}

std::vector<Region> tap_windows(const ConvShape& shape) {
  const Axis vertical = vertical_axis(shape), horizontal = horizontal_axis(shape);
  std::vector<Region> windows;
  for (int64_t p = 0; p < shape.kernel_h; ++p) {
    for (int64_t q = 0; q < shape.kernel_w; ++q) {
      const Interval y = vertical.window(p, p), x = horizontal.window(q, q);
      windows.push_back({y.first, y.count, x.first, x.count, 0, 0});
    }
  }
  return windows;
}

}  // namespace kfac
