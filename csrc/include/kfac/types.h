// Plain types shared by every kernel. No torch, no Python: kernels know pointers, sizes and strides.
#pragma once

#include <cstdint>

namespace kfac {

// Element types an input may have; factors are kept in float (double for kFloat64 input).
enum class DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

constexpr int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace kfac
