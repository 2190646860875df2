#pragma once

#include <cstdint>
#include <functional>

namespace kfac {

// Runs body(0), ..., body(count - 1), each once, on at most `threads` threads; returns when all are done.
// Indices are handed out in increasing order to whichever thread is free, so results must not depend on who runs what.
// The OpenMP pool that the process has already loaded (torch's) is used, so two pools never fight for the cores.
void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& body);

// "openmp" when a loaded OpenMP runtime was found, else "threads".
const char* parallel_backend();

}  // namespace kfac
