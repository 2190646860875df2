#include "simulated_block.h"

#include <ucontext.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "kfac/device.h"

namespace simulated {
namespace {

constexpr size_t kStackBytes = 64 << 10;

// The matrix unit: exact products of tf32 operands, added to d and cut (not rounded) to float32. Hardware keeps a bit
// or two more inside; cutting is the pessimistic reading of what has been measured on Ampere and Hopper.
float cut_to_float(double value) {
  const float nearest = static_cast<float>(value);
  if (!std::isfinite(nearest) || std::fabs(static_cast<double>(nearest)) <= std::fabs(value)) return nearest;
  return std::nextafter(nearest, 0.0f);
}

float as_tf32(uint32_t bits) {
  return kfac::bits_float(bits & ~0x1fffu);
}

struct MmaOperands {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

// Where register e of lane l lies in A [16, 8], B [8, 8] and D [16, 8] of mma.sync.m16n8k8, counted down the columns of
// A and D and along the rows of B. Written down here a second time, in other words than in the kernels: a wrong map
// there must not agree with a wrong one here.
int place_in_a(int l, int e) {
  return 16 * (l % 4) + l / 4 + 8 * (e % 2) + 64 * (e / 2);
}
int place_in_b(int l, int e) {
  return 8 * (l % 4) + l / 4 + 32 * e;
}
int place_in_d(int l, int e) {
  return 32 * (l % 4) + l / 4 + 16 * (e % 2) + 8 * (e / 2);
}

void multiply(const MmaOperands (&lanes)[32]) {
  double a[8 * 16], b[8 * 8], d[8 * 16];
  for (int l = 0; l < 32; ++l) {
    for (int e = 0; e < 4; ++e) a[place_in_a(l, e)] = as_tf32(lanes[l].a[e]);
    for (int e = 0; e < 2; ++e) b[place_in_b(l, e)] = as_tf32(lanes[l].b[e]);
    for (int e = 0; e < 4; ++e) d[place_in_d(l, e)] = lanes[l].d[e];
  }
  for (int column = 0; column < 8; ++column) {
    for (int k = 0; k < 8; ++k) {
      for (int row = 0; row < 16; ++row) d[16 * column + row] += a[16 * k + row] * b[8 * k + column];
    }
  }
  for (int l = 0; l < 32; ++l) {
    for (int e = 0; e < 4; ++e) lanes[l].d[e] = cut_to_float(d[place_in_d(l, e)]);
  }
}

}  // namespace

class Simulation {
 public:
  Simulation(int threads, int64_t shared_bytes, const Schedule& schedule, const std::function<void(Block&)>& body)
      : schedule(schedule), shared(shared_bytes / sizeof(float)), body_(body), fibers_(threads), warps_(threads / 32) {}

  void run_block(int index) {
    block_index = index;
    shared.assign(shared.size(), std::numeric_limits<float>::quiet_NaN());
    arrived_ = done_ = 0;
    for (size_t t = 0; t < fibers_.size(); ++t) start(int(t));
    current_ = schedule.order == Order::kForward ? 0 : int(fibers_.size()) - 1;
    if (_setjmp(home_) == 0) resume(current_);
  }

  void barrier() {
    Fiber& fiber = fibers_[current_];
    if (++arrived_ == int(fibers_.size())) {
      arrived_ = 0;
      for (Fiber& other : fibers_) other.waiting = false;
    } else {
      fiber.waiting = true;
    }
    next();
  }

  void warp_mma(const MmaOperands& operands) {
    Warp& warp = warps_[current_ / 32];
    warp.lanes[current_ % 32] = operands;
    if (++warp.arrived < 32) {
      fibers_[current_].waiting = true;
      return next();
    }
    warp.arrived = 0;
    multiply(warp.lanes);
    for (int lane = 0; lane < 32; ++lane) fibers_[current_ / 32 * 32 + lane].waiting = false;
  }

  const Schedule schedule;
  std::vector<float> shared;
  int block_index = 0;

 private:
  struct Fiber {
    Block block;
    std::unique_ptr<char[]> stack;
    ucontext_t context;
    jmp_buf place;
    bool started, waiting, done;
  };
  struct Warp {
    int arrived = 0;
    MmaOperands lanes[32];
  };

  static void enter() {
    Simulation* self = running_;
    self->body_(self->fibers_[self->current_].block);
    self->finish();
  }

  void start(int thread) {
    Fiber& fiber = fibers_[thread];
    fiber.block = Block();
    fiber.block.simulation_ = this;
    fiber.block.thread_ = thread;
    fiber.started = fiber.waiting = fiber.done = false;
    if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }

  void resume(int thread) {
    current_ = thread;
    Fiber& fiber = fibers_[thread];
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    running_ = this;
    setcontext(&fiber.context);
  }

  // Leaves the current fiber for the next that can run; returns when its turn comes again.
  void next() {
    if (_setjmp(fibers_[current_].place) == 0) leave();
  }

  [[noreturn]] void leave() {
    const int count = int(fibers_.size()), step = schedule.order == Order::kForward ? 1 : count - 1;
    for (int i = 1; i <= count; ++i) {
      const int thread = int((int64_t(current_) + int64_t(i) * step) % count);
      if (!fibers_[thread].waiting && !fibers_[thread].done) {
        resume(thread);
      }
    }
    std::abort();  // every thread waits: a barrier that not all threads reach
  }

  [[noreturn]] void finish() {
    fibers_[current_].done = true;
    if (++done_ == int(fibers_.size())) _longjmp(home_, 1);
    leave();
  }

  static Simulation* running_;
  const std::function<void(Block&)>& body_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  jmp_buf home_;
  int current_ = 0, arrived_ = 0, done_ = 0;
};

Simulation* Simulation::running_ = nullptr;

int Block::index() const {
  return simulation_->block_index;
}
int Block::count() const {
  return simulation_->schedule.blocks;
}
float* Block::shared() const {
  return simulation_->shared.data();
}
void Block::sync() {
  simulation_->barrier();
}

void Block::copy16(float* to, const float* from, bool valid) {
  const auto misaligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 != 0; };
  if (misaligned(from) || (to - shared()) % 4 != 0) std::abort();  // the hardware would fault
  open_.push_back({to, from, valid});
}

void Block::commit() {
  groups_.push_back(std::move(open_));
  open_.clear();
  if (simulation_->schedule.copies == Copies::kEarly) land(0);
}

void Block::land(int pending) {
  while (int(groups_.size()) > pending) {
    for (const Copy& copy : groups_.front()) {
      if (copy.valid) {
        memcpy(copy.to, copy.from, 16);
      } else {
        memset(copy.to, 0, 16);
      }
    }
    groups_.erase(groups_.begin());
  }
}

void Block::mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  simulation_->warp_mma({d, a, b});
}

void run(int threads, int64_t shared_bytes, const Schedule& schedule, const std::function<void(Block&)>& body) {
  Simulation simulation(threads, shared_bytes, schedule, body);
  for (int block = 0; block < schedule.blocks; ++block) simulation.run_block(block);
}

}  // namespace simulated
