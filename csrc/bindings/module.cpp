// The compiled module kfac_ext._C. Only kfac_ext/ops imports it: it trusts the pointers and sizes it is given.
#include "kfac/parallel.h"
#include "kfac/simd.h"
#include "register.h"

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
