// Runs the body of a GPU kernel on the CPU, thread by thread: the very code of csrc/cuda/*.cuh, with the hardware's
// part (barriers, asynchronous copies, matrix instructions) played by this class.
//
// Every thread of a block is a fiber. Barriers and warp instructions switch to the next one, in increasing or
// decreasing order of threads. Asynchronous copies land at once or as late as a wait allows. A kernel without races
// gives the same bits whichever is chosen. Shared memory is filled with NaN before each block.
//
// Blocks run one after the other, unless the kernel's blocks meet: then all at once.
//
// A kernel's body is a function template over Block with thread(), index(), count(), shared(), sync(), copy16(),
// copy4(), commit(), wait<n>(), mma(), mma_halves(), load_turned(), shuffle_xor() and meet();
// csrc/cuda/device_block.cuh is the real one.
#pragma once

#include <csetjmp>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "kfac/types.h"

namespace simulated {

enum class Order { kForward, kBackward };
enum class Copies { kEarly, kLate };

struct Schedule {
  Order order = Order::kForward;
  Copies copies = Copies::kLate;
  int blocks = 3;  // few, so that each takes several tiles
  bool together = false;
};

class Simulation;

class Block {
 public:
  int thread() const { return thread_; }
  int index() const;
  int count() const;
  float* shared() const;
  void sync();
  void copy16(void* shared, const void* global, bool valid);
  void copy4(float* shared, const float* global, bool valid);
  void commit();
  template <int kPending>
  void wait() {
    land(kPending);
  }
  // d = c + a b: mma.sync.m16n8k8 on tf32
  void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]);
  // mma.sync.m16n8k16 on bf16 or fp16
  template <kfac::DType kDType>
  void mma_halves(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
    mma_halves(kDType, d, a, b, c);
  }
  // ldmatrix.x4.trans
  void load_turned(uint32_t (&to)[4], const uint16_t* row);
  float shuffle_xor(float value, int mask);
  double shuffle_xor(double value, int mask);
  // only where blocks run together
  void meet(uint32_t* arrived, uint32_t target);

 private:
  friend class Simulation;
  struct Copy {
    void* to;
    const void* from;
    int bytes;
    bool valid;
  };
  bool is_aligned(const void* place) const;
  void land(int pending);
  void mma_halves(kfac::DType dtype, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  const float (&c)[4]);

  Simulation* simulation_ = nullptr;
  int thread_ = 0, place_ = 0;             // place: among the blocks that run at once
  std::vector<std::vector<Copy>> groups_;  // committed and not yet landed
  std::vector<Copy> open_;
};

// Runs body(block) for every thread of every block; `threads` a multiple of 32.
void run(int threads, int64_t shared_bytes, const Schedule& schedule, const std::function<void(Block&)>& body);

}  // namespace simulated
