// How Python calls a kernel: other Python threads run meanwhile, and Ctrl-C ends it.
#pragma once

#include <pybind11/pybind11.h>

#include "kfac/parallel.h"

// Whether a signal handler of Python has raised, as Ctrl-C's does; Python runs them on the process's main thread alone.
bool signal_has_raised();

// What `run` returns. An interrupt of it is the exception that the signal handler has raised.
template <class Run>
auto without_gil(Run run) {
  try {
    const pybind11::gil_scoped_release no_gil;
    const kfac::InterruptWatch watch(signal_has_raised);
    return run();
  } catch (const kfac::Interrupted&) {
    throw pybind11::error_already_set();
  }
}
