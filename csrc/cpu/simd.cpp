#include "kfac/simd.h"

#include <cstdlib>
#include <cstring>

#include "kfac/simd_greedy.h"
#include "kfac/simd_linalg.h"

namespace kfac {

namespace baseline {
extern const SimdKernels kSimdKernels;
extern const LinalgSimd kLinalgSimd;
extern const GreedySimd kGreedySimd;
}  // namespace baseline
#ifdef KFAC_X86
namespace avx2 {
extern const SimdKernels kSimdKernels;
extern const LinalgSimd kLinalgSimd;
extern const GreedySimd kGreedySimd;
}  // namespace avx2
namespace avx512 {
extern const SimdKernels kSimdKernels;
extern const LinalgSimd kLinalgSimd;
extern const GreedySimd kGreedySimd;
}  // namespace avx512
#endif

namespace {

struct Variant {
  const SimdKernels& panels;
  const LinalgSimd& linalg;
  const GreedySimd& greedy;
};

#ifdef KFAC_X86
bool allowed(const char* name) {
  const char* wanted = std::getenv("KFAC_SIMD");
  return !wanted || !*wanted || std::strcmp(wanted, name) == 0;
}
#endif

Variant choose() {
#ifdef KFAC_X86
  __builtin_cpu_init();
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return {avx512::kSimdKernels, avx512::kLinalgSimd, avx512::kGreedySimd};
  }
  if ((allowed("avx2") || allowed("avx512")) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return {avx2::kSimdKernels, avx2::kLinalgSimd, avx2::kGreedySimd};
  }
#endif
  return {baseline::kSimdKernels, baseline::kLinalgSimd, baseline::kGreedySimd};
}

const Variant& chosen() {
  static const Variant variant = choose();
  return variant;
}

}  // namespace

const SimdKernels& simd() {
  return chosen().panels;
}

const LinalgSimd& linalg_simd() {
  return chosen().linalg;
}

const GreedySimd& greedy_simd() {
  return chosen().greedy;
}

}  // namespace kfac
