// Plain types shared by every kernel. No torch, no Python: kernels know pointers, sizes and strides.
#pragma once

#include <cstdint>

// KFAC_HD: index maps and arithmetic, for hosts and devices. KFAC_DEVICE: bodies of kernels; a plain C++ compiler sees
// ordinary functions, which is how the native tests run a kernel's schedule with simulated threads.
#ifdef __CUDACC__
#define KFAC_HD __host__ __device__ inline
#define KFAC_HD_MEMBER __host__ __device__
#define KFAC_DEVICE __device__ __forceinline__
#define KFAC_UNROLL _Pragma("unroll")
#define KFAC_PRAGMA(text) _Pragma(#text)
#define KFAC_UNROLL_BY(count) KFAC_PRAGMA(unroll count)
#else
#define KFAC_HD inline
#define KFAC_HD_MEMBER
#define KFAC_DEVICE inline
#define KFAC_UNROLL
#define KFAC_UNROLL_BY(count)
#endif

namespace kfac {

// Element types an input may have; factors are kept in float (double for kFloat64 input).
enum class DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

KFAC_HD constexpr int64_t element_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

KFAC_HD constexpr int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace kfac
