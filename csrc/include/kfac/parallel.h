// Loops over threads, and how they end before their time.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <type_traits>

namespace kfac {

// The body of a loop, body(i) or body(i, worker), which must outlive it: unlike std::function it takes no memory.
class LoopBody {
 public:
  template <class Body, class = std::enable_if_t<!std::is_same_v<Body, LoopBody>>>
  LoopBody(const Body& body) : body_(&body), call_(&call<Body>) {}

  void operator()(int64_t i, int worker) const { call_(body_, i, worker); }

 private:
  template <class Body>
  static void call(const void* pointer, int64_t i, int worker) {
    const Body& body = *static_cast<const Body*>(pointer);
    if constexpr (std::is_invocable_v<const Body&, int64_t, int>) {
      body(i, worker);
    } else {
      body(i);
    }
  }

  const void* body_;
  void (*call_)(const void*, int64_t, int);
};

// Runs body(0), ..., body(count - 1), each once, on at most `threads` threads; returns when all are done.
// Indices are handed out in increasing order to whichever thread is free, so results must not depend on who runs what.
// `worker`, below `threads`, is the same in all that one thread runs and in no other: it may own a part of a buffer.
// The OpenMP pool that the process has already loaded (torch's) is used, so two pools never fight for the cores.
// What a body throws ends the loop and is thrown here; where no thread can be had, there are fewer.
void parallel_for(int64_t count, int threads, LoopBody body);

// "openmp" when a loaded OpenMP runtime was found, else "threads".
const char* parallel_backend();

// ---- interrupts ----

// Thrown where a watch was told to stop.
struct Interrupted : std::exception {
  const char* what() const noexcept override { return "interrupted"; }
};

// While it lives, kernels that this thread calls ask `stop` now and then, on this thread, and throw Interrupted once it
// says yes.
class InterruptWatch {
 public:
  explicit InterruptWatch(bool (*stop)());
  ~InterruptWatch();
  InterruptWatch(const InterruptWatch&) = delete;
  InterruptWatch& operator=(const InterruptWatch&) = delete;

  void check(bool owner);

 private:
  bool (*stop_)();
  std::atomic<bool> stopped_{false};
  std::chrono::steady_clock::time_point next_;
  InterruptWatch* const outer_;
};

// While it lives, no kernel is interrupted: for what must be done whole or not at all.
class Uninterrupted {
 public:
  Uninterrupted();
  ~Uninterrupted();
  Uninterrupted(const Uninterrupted&) = delete;
  Uninterrupted& operator=(const Uninterrupted&) = delete;

 private:
  InterruptWatch* const watch_;
};

// A place where a kernel may stop. `parallel_for` is one before each index; this is for long bodies.
void check_interrupt();

}  // namespace kfac
