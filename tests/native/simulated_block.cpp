#include "simulated_block.h"

#include <ucontext.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "kfac/device.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace simulated {
namespace {

// AddressSanitizer is told of each change of stacks: it would take the frames of fibers for wild addresses.
void leave_for([[maybe_unused]] const void* stack, [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(nullptr, stack, bytes);
#endif
}

// The stack that was left for this one.
void arrive_from([[maybe_unused]] const void** stack, [[maybe_unused]] size_t* bytes) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, stack, bytes);
#endif
}

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

// Register e of lane l of mma.sync.m16n8k16 on halves holds two: row and first column in A [16, 16], first row and
// column in B [16, 8]; the second follows in the next column, or row.
void multiply_halves(kfac::DType dtype, const MmaOperands (&lanes)[32]) {
  double a[16][16], b[16][8];
  for (int l = 0; l < 32; ++l) {
    for (int h = 0; h < 2; ++h) {
      const auto half = [&](uint32_t pair) { return kfac::element_of(pair >> 16 * h & 0xffff, dtype); };
      for (int e = 0; e < 4; ++e) a[l / 4 + (e & 1) * 8][l % 4 * 2 + (e & 2) * 4 + h] = half(lanes[l].a[e]);
      for (int e = 0; e < 2; ++e) b[l % 4 * 2 + e * 8 + h][l / 4] = half(lanes[l].b[e]);
    }
  }
  for (int l = 0; l < 32; ++l) {
    for (int e = 0; e < 4; ++e) {
      const int row = place_in_d(l, e) % 16, column = place_in_d(l, e) / 16;
      double sum = lanes[l].d[e];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      lanes[l].d[e] = cut_to_float(sum);
    }
  }
}

struct TurnedLoad {
  uint32_t* to;
  const uint16_t* row;
};

// Row r of matrix m is what lane 8 m + r names; lane l gets column l / 4 of each matrix, rows 2 (l % 4) and the next.
void load_turned(const TurnedLoad (&lanes)[32]) {
  for (int m = 0; m < 4; ++m) {
    for (int l = 0; l < 32; ++l) {
      const TurnedLoad* const rows = lanes + 8 * m + l % 4 * 2;
      lanes[l].to[m] = rows[0].row[l / 4] | uint32_t(rows[1].row[l / 4]) << 16;
    }
  }
}

}  // namespace

class Simulation {
 public:
  Simulation(int threads, int64_t shared_bytes, const Schedule& schedule, const std::function<void(Block&)>& body)
      : schedule(schedule),
        threads_(threads),
        body_(body),
        states_(schedule.together ? schedule.blocks : 1),
        fibers_(states_.size() * threads),
        warps_(fibers_.size() / 32) {
    for (State& state : states_) state.shared.resize(shared_bytes / sizeof(float));
  }

  void run_all() {
    for (int first = 0; first < schedule.blocks; first += int(states_.size())) run_from(first);
  }

  void barrier() {
    const int place = current_ / threads_;
    if (++states_[place].arrived == threads_) {
      states_[place].arrived = 0;
      for (int t = 0; t < threads_; ++t) fibers_[place * threads_ + t].waiting = false;
    } else {
      fibers_[current_].waiting = true;
    }
    next();
  }

  void warp_mma(const MmaOperands& operands) {
    warps_[current_ / 32].lanes[current_ % 32] = operands;
    if (warp_arrives()) multiply(warps_[current_ / 32].lanes);
    warp_leaves();
  }

  void warp_mma_halves(kfac::DType dtype, const MmaOperands& operands) {
    warps_[current_ / 32].lanes[current_ % 32] = operands;
    if (warp_arrives()) multiply_halves(dtype, warps_[current_ / 32].lanes);
    warp_leaves();
  }

  void warp_load_turned(const TurnedLoad& load) {
    warps_[current_ / 32].loads[current_ % 32] = load;
    if (warp_arrives()) load_turned(warps_[current_ / 32].loads);
    warp_leaves();
  }

  double shuffle_xor(double value, int mask) {
    Warp& warp = warps_[current_ / 32];
    warp.given[current_ % 32] = value;
    if (warp_arrives()) {
      for (int lane = 0; lane < 32; ++lane) fibers_[current_ / 32 * 32 + lane].received = warp.given[lane ^ mask];
    }
    warp_leaves();
    return fibers_[current_].received;
  }

  void meet(uint32_t* arrived, uint32_t target) {
    constexpr int64_t kPatience = 100000000;
    barrier();
    if (current_ % threads_ == 0) {
      ++*arrived;
      for (int64_t waited = 0; int32_t(*arrived - target) < 0; ++waited) {
        if (waited == kPatience) std::abort();  // a block of the team never comes
        next();
      }
    }
    barrier();
  }

  struct State {
    int index = 0, arrived = 0;
    std::vector<float> shared;
  };
  State& state(int place) { return states_[place]; }

  const Schedule schedule;

 private:
  struct Fiber {
    Block block;
    std::unique_ptr<char[]> stack;
    ucontext_t context;
    jmp_buf place;
    double received;
    bool started, waiting, done;
  };
  struct Warp {
    int arrived = 0;
    MmaOperands lanes[32];
    TurnedLoad loads[32];
    double given[32];
  };

  static void enter() {
    Simulation* self = running_;
    self->arrive();
    self->body_(self->fibers_[self->current_].block);
    self->finish();
  }

  void run_from(int first) {
    for (size_t place = 0; place < states_.size(); ++place) begin(int(place), first + int(place));
    done_ = 0;
    current_ = schedule.order == Order::kForward ? 0 : int(fibers_.size()) - 1;
    from_home_ = true;
    if (_setjmp(home_) == 0) resume(current_);
    arrive_from(nullptr, nullptr);
  }

  // In a fiber, whose turn has come.
  void arrive() {
    arrive_from(from_home_ ? &home_stack_ : nullptr, from_home_ ? &home_bytes_ : nullptr);
    from_home_ = false;
  }

  void begin(int place, int index) {
    State& state = states_[place];
    state.index = index;
    state.arrived = 0;
    state.shared.assign(state.shared.size(), std::numeric_limits<float>::quiet_NaN());
    for (int t = 0; t < threads_; ++t) start(place, t);
  }

  void start(int place, int thread) {
    Fiber& fiber = fibers_[place * threads_ + thread];
    fiber.block = Block();
    fiber.block.simulation_ = this;
    fiber.block.thread_ = thread;
    fiber.block.place_ = place;
    fiber.started = fiber.waiting = fiber.done = false;
    if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }

  // Whether the current lane is the last of its warp.
  bool warp_arrives() {
    fibers_[current_].waiting = true;
    return ++warps_[current_ / 32].arrived == 32;
  }

  // The last lane to arrive sets the others free; they wait until then.
  void warp_leaves() {
    Warp& warp = warps_[current_ / 32];
    if (warp.arrived < 32) return next();
    warp.arrived = 0;
    for (int lane = 0; lane < 32; ++lane) fibers_[current_ / 32 * 32 + lane].waiting = false;
  }

  void resume(int fiber_number) {
    current_ = fiber_number;
    Fiber& fiber = fibers_[fiber_number];
    leave_for(fiber.stack.get(), kStackBytes);
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    running_ = this;
    setcontext(&fiber.context);
  }

  // Leaves the current fiber for the next that can run; returns when its turn comes again.
  void next() {
    if (_setjmp(fibers_[current_].place) == 0) leave();
    arrive();
  }

  [[noreturn]] void leave() {
    const int count = int(fibers_.size()), step = schedule.order == Order::kForward ? 1 : count - 1;
    for (int i = 1; i <= count; ++i) {
      const int number = int((int64_t(current_) + int64_t(i) * step) % count);
      if (!fibers_[number].waiting && !fibers_[number].done) {
        resume(number);
      }
    }
    std::abort();  // every thread waits: a barrier that not all threads reach
  }

  [[noreturn]] void finish() {
    fibers_[current_].done = true;
    if (++done_ < int(fibers_.size())) leave();
    leave_for(home_stack_, home_bytes_);
    _longjmp(home_, 1);
  }

  static Simulation* running_;
  const int threads_;
  const std::function<void(Block&)>& body_;
  std::vector<State> states_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  jmp_buf home_;
  const void* home_stack_ = nullptr;
  size_t home_bytes_ = 0;
  bool from_home_ = false;
  int current_ = 0, done_ = 0;
};

Simulation* Simulation::running_ = nullptr;

int Block::index() const {
  return simulation_->state(place_).index;
}
int Block::count() const {
  return simulation_->schedule.blocks;
}
float* Block::shared() const {
  return simulation_->state(place_).shared.data();
}
void Block::sync() {
  simulation_->barrier();
}
float Block::shuffle_xor(float value, int mask) {
  return float(simulation_->shuffle_xor(value, mask));
}
double Block::shuffle_xor(double value, int mask) {
  return simulation_->shuffle_xor(value, mask);
}
void Block::meet(uint32_t* arrived, uint32_t target) {
  simulation_->meet(arrived, target);
}

// Whether an address in shared memory is a multiple of 16, where the hardware would fault.
bool Block::is_aligned(const void* place) const {
  return (static_cast<const char*>(place) - reinterpret_cast<const char*>(shared())) % 16 == 0;
}

void Block::copy16(void* to, const void* from, bool valid) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0 || !is_aligned(to)) std::abort();
  open_.push_back({to, from, 16, valid});
}

void Block::copy4(float* to, const float* from, bool valid) {
  open_.push_back({to, from, 4, valid});
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
        memcpy(copy.to, copy.from, copy.bytes);
      } else {
        memset(copy.to, 0, copy.bytes);
      }
    }
    groups_.erase(groups_.begin());
  }
}

void Block::mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
  if (&d[0] != &c[0]) memcpy(d, c, sizeof d);
  simulation_->warp_mma({d, a, b});
}

void Block::mma_halves(kfac::DType dtype, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                       const float (&c)[4]) {
  if (&d[0] != &c[0]) memcpy(d, c, sizeof d);
  simulation_->warp_mma_halves(dtype, {d, a, b});
}

void Block::load_turned(uint32_t (&to)[4], const uint16_t* row) {
  if (!is_aligned(row)) std::abort();
  simulation_->warp_load_turned({to, row});
}

void run(int threads, int64_t shared_bytes, const Schedule& schedule, const std::function<void(Block&)>& body) {
  Simulation(threads, shared_bytes, schedule, body).run_all();
}

}  // namespace simulated
