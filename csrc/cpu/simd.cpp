#include "kfac/simd.h"

#include <cstdlib>
#include <cstring>

namespace kfac {

namespace baseline {
extern const SimdKernels kSimdKernels;
}
#ifdef KFAC_X86
namespace avx2 {
extern const SimdKernels kSimdKernels;
}
namespace avx512 {
extern const SimdKernels kSimdKernels;
}
#endif

namespace {

bool allowed(const char* name) {
  const char* wanted = std::getenv("KFAC_SIMD");
  return !wanted || !*wanted || std::strcmp(wanted, name) == 0;
}

const SimdKernels& choose() {
#ifdef KFAC_X86
  __builtin_cpu_init();
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return avx512::kSimdKernels;
  }
  if ((allowed("avx2") || allowed("avx512")) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return avx2::kSimdKernels;
  }
#endif
  return baseline::kSimdKernels;
}

}  // namespace

const SimdKernels& simd() {
  static const SimdKernels& chosen = choose();
  return chosen;
}

}  // namespace kfac
