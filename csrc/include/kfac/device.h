// Code that a GPU and a plain C++ compiler share. No CUDA header is needed to read it.
#pragma once

#include <cstdint>
#include <cstring>

#include "kfac/types.h"

namespace kfac {

template <class T>
KFAC_HD constexpr T align_up(T value, T step) {
  return (value + step - 1) / step * step;
}

template <class T>
KFAC_HD constexpr T smaller(T a, T b) {
  return b < a ? b : a;
}

KFAC_HD uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

KFAC_HD float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Division by a number known beforehand, for dividends below 2^31: a multiplication and a shift.
struct Divider {
  uint32_t divisor, multiplier, shift;

  Divider() = default;
  explicit Divider(uint32_t d) : divisor(d), shift(31) {
    while (uint64_t(1) << (shift - 31) < d) ++shift;
    multiplier = uint32_t((uint64_t(1) << shift) / d + 1);
  }

  KFAC_HD_MEMBER uint32_t quotient(uint32_t n) const { return uint32_t(uint64_t(n) * multiplier >> shift); }
  KFAC_HD_MEMBER uint32_t remainder(uint32_t n) const { return n - quotient(n) * divisor; }
};

// The nearest tf32 (10 bits of mantissa), ties away from zero: what cvt.rna.tf32.f32 gives.
KFAC_HD uint32_t round_to_tf32(float value) {
#ifdef __CUDA_ARCH__
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
#else
  const uint32_t bits = float_bits(value), exponent = 0x7f800000u;
  return (bits & exponent) == exponent ? bits : (bits + 0x1000u) & ~0x1fffu;
#endif
}

// a b, never fused with an addition that follows.
KFAC_HD float rounded_product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

KFAC_HD float bfloat16_to_float(uint16_t value) {
  return bits_float(uint32_t(value) << 16);
}

KFAC_HD float half_to_float(uint16_t value) {
#ifdef __CUDA_ARCH__
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value));
  return result;
#else
  const uint32_t sign = uint32_t(value & 0x8000u) << 16, magnitude = value & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | (magnitude << 13));
  // as a subnormal float times 2^112: exact, whether the half is normal or not
  return bits_float(sign | float_bits(bits_float(magnitude << 13) * bits_float(0x77800000u)));
#endif
}

// Element `at` of an array of `dtype`, as its bits; and the float that these are. Apart, so that many are asked for
// before the first is there.
KFAC_HD uint32_t load_bits(const void* data, DType dtype, int64_t at) {
  return dtype == DType::kFloat32 ? static_cast<const uint32_t*>(data)[at] : static_cast<const uint16_t*>(data)[at];
}

KFAC_HD void store_bits(void* data, DType dtype, int64_t at, uint32_t bits) {
  if (dtype == DType::kFloat32) {
    static_cast<uint32_t*>(data)[at] = bits;
  } else {
    static_cast<uint16_t*>(data)[at] = uint16_t(bits);
  }
}

KFAC_HD float element_of(uint32_t bits, DType dtype) {
  if (dtype == DType::kFloat32) return bits_float(bits);
  return dtype == DType::kBFloat16 ? bfloat16_to_float(uint16_t(bits)) : half_to_float(uint16_t(bits));
}

// 16 bytes at once, from a multiple of 16.
struct alignas(16) Float4 {
  float value[4];
};

KFAC_HD Float4 load4(const float* from) {
  return *reinterpret_cast<const Float4*>(from);
}

KFAC_HD void store4(float* to, const Float4& values) {
  *reinterpret_cast<Float4*>(to) = values;
}

// ---- jobs in one launch --------------------------------------------------------------------------------------------

// A list of jobs, each cut into tiles. Tiles are numbered through: job j has tiles first[j] to first[j + 1] - 1.
template <class Job>
struct JobList {
  const Job* jobs;
  const int32_t* first;  // [count + 1]
  int32_t count;
  int32_t tiles;
};

// The job a tile belongs to, for tiles asked for in increasing order, starting from the answer before.
KFAC_HD int32_t job_of_tile(const int32_t* first, int32_t job, int32_t tile) {
  while (first[job + 1] <= tile) ++job;
  return job;
}

}  // namespace kfac
