// The hardware's part of a kernel: what tests/native/simulated_block.h plays on the CPU.
#pragma once

#include <cuda_runtime.h>

#include "kfac/device.h"

namespace kfac {

// d = c + a b by an mma instruction with four registers of a and two of b
#define KFAC_MMA(instruction)                                                                                       \
  asm volatile(instruction " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};\n"                           \
               : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), \
                 "f"(c[3]))

class DeviceBlock {
 public:
  __device__ int thread() const { return threadIdx.x; }
  __device__ int index() const { return blockIdx.x; }
  __device__ int count() const { return gridDim.x; }

  // The block's dynamic shared memory, 16-byte aligned.
  __device__ float* shared() const {
    extern __shared__ float4 memory[];
    return reinterpret_cast<float*>(memory);
  }

  __device__ void sync() const { __syncthreads(); }

  // `value` of the lane whose number differs by these bits; all 32 lanes of the warp call it.
  template <class T>
  __device__ T shuffle_xor(T value, int mask) const {
    return __shfl_xor_sync(0xffffffffu, value, mask);
  }

  // A barrier among the blocks of a team, all of them resident: returns once `arrived`, zero at first, has been raised
  // to `target` by one block after the other. What they wrote before is then visible.
  __device__ void meet(uint32_t* arrived, uint32_t target) const {
    __syncthreads();
    if (threadIdx.x == 0) {
      uint32_t now;
      __threadfence();
      asm volatile("red.release.gpu.global.add.u32 [%0], 1;\n" ::"l"(arrived) : "memory");
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\n" : "=r"(now) : "l"(arrived) : "memory");
      } while (static_cast<int32_t>(now - target) < 0);
      __threadfence();
    }
    __syncthreads();
  }

  // Starts a copy of 16 bytes into shared memory; zeros if not `valid` (`global` is not read then).
  __device__ void copy16(void* shared, const void* global, bool valid) const {
    const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
  }

  // The same of 4 bytes, of any place.
  __device__ void copy4(float* shared, const float* global, bool valid) const {
    const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(to), "l"(global), "r"(valid ? 4 : 0)
                 : "memory");
  }

  // Closes a group of copies; wait<n> waits until at most the n latest groups of this thread are under way.
  __device__ void commit() const { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
  template <int kPending>
  __device__ void wait() const {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
  }

  // d = c + a b, a [16, 8] and b [8, 8] in tf32; who holds what: kfac/covariance_group.h
  __device__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) const {
    KFAC_MMA("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32");
  }

  // Four matrices [8, 8] of halves from shared memory, turned: lane 8 m + r names row r of matrix m, 16 bytes from a
  // multiple of 16; of matrix m it gets entries (2 quad, group) and (2 quad + 1, group), low and high half of to[m].
  __device__ void load_turned(uint32_t (&to)[4], const uint16_t* row) const {
    const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  }

  // d = c + a b, a [16, 16] and b [16, 8] in bf16 or fp16
  template <DType kDType>
  __device__ void mma_halves(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) const {
    if constexpr (kDType == DType::kBFloat16) {
      KFAC_MMA("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32");
    } else {
      KFAC_MMA("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32");
    }
  }
};

#undef KFAC_MMA

}  // namespace kfac
