#include "kfac/power_iteration_group.h"

#include <algorithm>
#include <numeric>
#include <queue>
#include <stdexcept>
#include <string>
#include <utility>

#include "descriptors.h"

namespace kfac {
namespace {

constexpr int64_t kSlotFloats = 16;  // barriers and vectors of different teams share no cache line

double cost(const EigenJob& job) {
  return double(job.n) * job.n;
}

// Blocks for a matrix if `share` of the work is one block's.
int32_t team_size(const EigenJob& job, double share, int64_t blocks, int64_t shared_floats) {
  if (power_rows_offset(job.n, true) + int64_t(job.n) * job.n <= shared_floats) return 1;
  const int64_t most = std::min(blocks, divide_up(job.n, kTeamRows));
  return int32_t(std::clamp<int64_t>(int64_t(cost(job) / share), 1, most));
}

class Distribution {
 public:
  Distribution(std::vector<EigenJob>& jobs, int64_t blocks, int64_t shared_floats)
      : jobs_(jobs), lists(blocks), loads_(blocks, 0.0) {
    double total = 0;
    for (const EigenJob& job : jobs) total += cost(job);
    for (EigenJob& job : jobs) job.blocks = team_size(job, total / double(blocks), blocks, shared_floats);
    place_teams();
    place_singles();
    while (!lists.empty() && lists.back().empty()) lists.pop_back();
  }

 private:
  // Side by side: sizes are rounded down, so they fit.
  void place_teams() {
    int32_t next = 0;
    for (size_t number = 0; number < jobs_.size(); ++number) {
      EigenJob& job = jobs_[number];
      if (job.blocks == 1) continue;
      job.first_block = next;
      for (const int32_t end = next + job.blocks; next < end; ++next) {
        lists[next].push_back(int32_t(number));
        loads_[next] = cost(job) / job.blocks;
      }
    }
  }

  // The largest first, each to the block that has least to do.
  void place_singles() {
    using Entry = std::pair<double, int32_t>;
    std::priority_queue<Entry, std::vector<Entry>, std::greater<Entry>> idle;
    for (size_t b = 0; b < loads_.size(); ++b) idle.emplace(loads_[b], int32_t(b));
    for (size_t number = 0; number < jobs_.size(); ++number) {
      EigenJob& job = jobs_[number];
      if (job.blocks > 1) continue;
      const auto [load, block] = idle.top();
      idle.pop();
      job.first_block = block;
      lists[block].push_back(int32_t(number));
      idle.emplace(load + cost(job), block);
    }
  }

  std::vector<EigenJob>& jobs_;

 public:
  std::vector<std::vector<int32_t>> lists;  // of each block

 private:
  std::vector<double> loads_;
};

void check(const std::vector<MatrixShape>& shapes, int64_t shared_bytes) {
  if (shapes.size() > kMaxPowerMatrices) {
    throw std::invalid_argument("power_iteration: " + std::to_string(shapes.size()) + " matrices, expected at most " +
                                std::to_string(kMaxPowerMatrices));
  }
  for (const MatrixShape& shape : shapes) {
    if (shape.n < 1 || !power_fits(shape.n, shared_bytes)) {
      throw std::invalid_argument("power_iteration: a matrix of size " + std::to_string(shape.n) +
                                  ", whose vectors do not fit into " + std::to_string(shared_bytes) +
                                  " bytes of shared memory");
    }
  }
}

}  // namespace

PowerGroup::PowerGroup(const std::vector<MatrixShape>& shapes, int64_t blocks, int64_t shared_bytes)
    : matrices_(int64_t(shapes.size())), shared_floats_(int32_t(shared_bytes / int64_t(sizeof(float)))) {
  if (blocks < 1) throw std::invalid_argument("power_iteration: no block fits on the device");
  check(shapes, shared_bytes);
  std::vector<int32_t> order(shapes.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return shapes[a].n > shapes[b].n; });
  std::vector<EigenJob> jobs;
  for (const int32_t place : order) {
    jobs.push_back({shapes[place].stride, int32_t(shapes[place].n), 0, 1, place, 0, 0, 0});
  }
  const Distribution distribution(jobs, blocks, shared_floats_);
  blocks_ = int32_t(distribution.lists.size());

  for (EigenJob& job : jobs) {
    if (job.blocks > 1) job.arrived = std::exchange(barrier_floats_, barrier_floats_ + kSlotFloats);
  }
  workspace_floats_ = barrier_floats_;
  const auto take = [&](int64_t floats) {
    return std::exchange(workspace_floats_, workspace_floats_ + align_up(floats, kSlotFloats));
  };
  for (EigenJob& job : jobs) {
    if (job.blocks == 1) continue;
    job.images = take(2 * int64_t(job.n));
    job.moments = take(2 * 2 * int64_t(job.blocks) * kPowerMoments);
  }

  count(jobs, distribution.lists);
  std::vector<int32_t> first{0}, list;
  for (const std::vector<int32_t>& own : distribution.lists) {
    list.insert(list.end(), own.begin(), own.end());
    first.push_back(int32_t(list.size()));
  }
  append(descriptors_, jobs);
  first_offset_ = append(descriptors_, first);
  list_offset_ = append(descriptors_, list);
}

void PowerGroup::count(const std::vector<EigenJob>& jobs, const std::vector<std::vector<int32_t>>& lists) {
  for (size_t block = 0; block < lists.size(); ++block) {
    double own = 0;
    for (const int32_t number : lists[block]) {
      const EigenJob& job = jobs[number];
      const RowRange rows = team_rows(job, int32_t(block) - job.first_block);
      own += double(rows.count) * job.n;
      counts_.kept += double(kept_rows(job, rows, shared_floats_)) * job.n;
    }
    counts_.entries += own;
    counts_.most = std::max(counts_.most, own);
  }
}

PowerSchedule PowerGroup::schedule(const void* descriptors) const {
  const char* const base = static_cast<const char*>(descriptors);
  return {reinterpret_cast<const EigenJob*>(base), reinterpret_cast<const int32_t*>(base + first_offset_),
          reinterpret_cast<const int32_t*>(base + list_offset_), blocks_, shared_floats_};
}

}  // namespace kfac
