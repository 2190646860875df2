#include "kfac/parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#ifdef __linux__
#include <link.h>
#endif

namespace kfac {
namespace {

// The entry point that `#pragma omp parallel` compiles to under GCC; LLVM's and Intel's runtimes offer it too.
using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

#ifdef __linux__
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
#ifdef __linux__
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

struct Team {
  const std::function<void(int64_t)>& body;
  int64_t count;
  std::atomic<int64_t> next{0};

  static void work(void* team_pointer) {
    Team& team = *static_cast<Team*>(team_pointer);
    for (int64_t i; (i = team.next.fetch_add(1, std::memory_order_relaxed)) < team.count;) team.body(i);
  }
};

}  // namespace

void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& body) {
  threads = static_cast<int>(std::min<int64_t>(threads, count));
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  Team team{body, count};
  if (const GompParallel run = openmp()) {
    run(Team::work, &team, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> helpers;
  for (int i = 1; i < threads; ++i) helpers.emplace_back(Team::work, &team);
  Team::work(&team);
  for (std::thread& helper : helpers) helper.join();
}

const char* parallel_backend() {
  return openmp() ? "openmp" : "threads";
}

}  // namespace kfac
