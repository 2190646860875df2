#include "kfac/parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#ifdef __linux__
#include <link.h>
#endif

namespace kfac {
namespace {

constexpr std::chrono::milliseconds kInterruptPeriod{50};

// The watch over what this thread computes, and whether this thread began it.
thread_local InterruptWatch* watch = nullptr;
thread_local bool owns_watch = false;

// The entry point that `#pragma omp parallel` compiles to under GCC; LLVM's and Intel's runtimes offer it too.
using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

#if defined(__linux__) && !defined(KFAC_OWN_THREADS)
int find_openmp(dl_phdr_info* info, size_t, void* name) {
  const char* file = std::strrchr(info->dlpi_name, '/');
  file = file ? file + 1 : info->dlpi_name;
  for (const char* prefix : {"libgomp", "libiomp5", "libomp"}) {
    if (std::strncmp(file, prefix, std::strlen(prefix)) == 0) {
      *static_cast<std::string*>(name) = info->dlpi_name;
      return 1;
    }
  }
  return 0;
}
#endif

GompParallel loaded_openmp() {
#if defined(__linux__) && !defined(KFAC_OWN_THREADS)
  std::string name;
  dl_iterate_phdr(find_openmp, &name);
  if (!name.empty()) {
    if (void* library = dlopen(name.c_str(), RTLD_LAZY | RTLD_NOLOAD)) {
      return reinterpret_cast<GompParallel>(dlsym(library, "GOMP_parallel"));
    }
  }
#endif
  return nullptr;
}

// A forked child inherits GNU OpenMP's team but not its threads, and would wait for them forever.
std::atomic<bool> forked{false};
const int watching_forks = pthread_atfork(nullptr, nullptr, [] { forked = true; });

GompParallel openmp() {
  static const GompParallel found = loaded_openmp();
  return forked ? nullptr : found;
}

class Team {
 public:
  Team(const LoopBody& body, int64_t count, int threads)
      : body_(body), count_(count), threads_(threads), watch_(watch), caller_(std::this_thread::get_id()) {}

  static void work(void* team) noexcept { static_cast<Team*>(team)->run(); }

  // Throws what the first body that threw has thrown.
  void finish() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  // An exception must not leave a thread of a pool: that would end the process.
  void run() noexcept {
    const int worker = workers_.fetch_add(1, std::memory_order_relaxed);
    if (worker >= threads_) return;
    const bool helps = std::this_thread::get_id() != caller_;
    if (helps) watch = watch_;
    try {
      while (!failed_.load(std::memory_order_relaxed)) {
        const int64_t i = next_.fetch_add(1, std::memory_order_relaxed);
        if (i >= count_) break;
        check_interrupt();
        body_(i, worker);
      }
    } catch (...) {
      if (!failed_.exchange(true)) error_ = std::current_exception();
    }
    if (helps) watch = nullptr;
  }

  const LoopBody body_;
  const int64_t count_;
  const int threads_;
  InterruptWatch* const watch_;
  const std::thread::id caller_;
  std::atomic<int64_t> next_{0};
  std::atomic<int> workers_{0};
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
};

// Helpers as far as there is memory for them.
std::vector<std::thread> start_helpers(int count, Team& team) {
  std::vector<std::thread> helpers;
  try {
    helpers.reserve(count);
    while (int(helpers.size()) < count) helpers.emplace_back(Team::work, &team);
  } catch (const std::exception&) {
    // the others do the work
  }
  return helpers;
}

}  // namespace

void parallel_for(int64_t count, int threads, LoopBody body) {
  threads = static_cast<int>(std::min<int64_t>(threads, count));
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) {
      check_interrupt();
      body(i, 0);
    }
    return;
  }
  Team team(body, count, threads);
  if (const GompParallel run = openmp()) {
    run(Team::work, &team, static_cast<unsigned>(threads), 0);
  } else {
    std::vector<std::thread> helpers = start_helpers(threads - 1, team);
    Team::work(&team);
    for (std::thread& helper : helpers) helper.join();
  }
  team.finish();
}

const char* parallel_backend() {
  return openmp() ? "openmp" : "threads";
}

InterruptWatch::InterruptWatch(bool (*stop)())
    : stop_(stop), next_(std::chrono::steady_clock::now() + kInterruptPeriod), outer_(watch) {
  watch = this;
  owns_watch = true;
}

InterruptWatch::~InterruptWatch() {
  watch = outer_;
  owns_watch = outer_ != nullptr;
}

void InterruptWatch::check(bool owner) {
  if (stopped_.load(std::memory_order_relaxed)) throw Interrupted();
  if (!owner || std::chrono::steady_clock::now() < next_) return;
  if (stop_()) {
    stopped_.store(true, std::memory_order_relaxed);
    throw Interrupted();
  }
  next_ = std::chrono::steady_clock::now() + kInterruptPeriod;
}

Uninterrupted::Uninterrupted() : watch_(watch) {
  watch = nullptr;
}

Uninterrupted::~Uninterrupted() {
  watch = watch_;
}

void check_interrupt() {
  if (watch) watch->check(owns_watch);
}

}  // namespace kfac
