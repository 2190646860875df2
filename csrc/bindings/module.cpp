// The compiled module kfac_ext._C. Only kfac_ext/ops imports it: it trusts the pointers that it is given, not the
// numbers.
#include <unistd.h>

#include "kfac/simd.h"
#ifdef __linux__
#include <sys/syscall.h>
#else
#include <pthread.h>
#endif

#include "register.h"
#include "without_gil.h"

namespace {

bool is_main_thread() {
#ifdef __linux__
  return syscall(SYS_gettid) == getpid();
#else
  return pthread_main_np() != 0;
#endif
}

}  // namespace

bool signal_has_raised() {
  if (!is_main_thread()) return false;
  const pybind11::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of kfac_ext; call kfac_ext's functions instead.";
  register_covariance(m);
  register_cuda(m);
  register_greedy(m);
  register_inverse(m);
  register_power_iteration(m);
  register_saliency(m);
  m.def("cpu_info", [] {
    pybind11::dict info;
    info["simd"] = kfac::simd().name;
    info["threads"] = kfac::parallel_backend();
    return info;
  });
}
