// What the programs of tests/native share: memory where the kernels run, and the choice of cases.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#ifdef KFAC_WITH_CUDA
#include <cuda_runtime.h>
#endif

namespace program {

// --device: the kernels run on the GPU instead of with simulated threads. Small enough for compute-sanitizer.
inline bool on_gpu = false;

#ifdef KFAC_WITH_CUDA
inline void expect(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
  std::exit(3);
}
// Calls a launcher on the GPU.
#define LAUNCH_ON_GPU(...) program::expect(__VA_ARGS__, #__VA_ARGS__)
#else
#define LAUNCH_ON_GPU(...) std::abort()
#endif

// The arrays of one call: the host's own, or copies on the GPU that `fetch` brings back.
class Arrays {
 public:
  Arrays() = default;
  Arrays(const Arrays&) = delete;
  Arrays& operator=(const Arrays&) = delete;
  ~Arrays() {
    for (void* block : blocks_) release(block);
  }

  template <class T>
  const T* input(const std::vector<T>& values) {
    return on_gpu ? static_cast<const T*>(copy(values.data(), values.size() * sizeof(T))) : values.data();
  }

  template <class T>
  T* output(std::vector<T>& values) {
    if (!on_gpu) return values.data();
    void* const data = copy(values.data(), values.size() * sizeof(T));
    outputs_.push_back({values.data(), data, values.size() * sizeof(T)});
    return static_cast<T*>(data);
  }

  // 256-byte aligned; NaN on the host, memory that nothing has written on the GPU.
  void* scratch(int64_t bytes) {
    void* data = nullptr;
#ifdef KFAC_WITH_CUDA
    if (on_gpu) expect(cudaMalloc(&data, size_t(bytes) + 1), "cudaMalloc");
#endif
    if (!on_gpu) {
      data = std::aligned_alloc(256, size_t(bytes / 256 + 1) * 256);
      memset(data, 0xff, size_t(bytes));
    }
    blocks_.push_back(data);
    return data;
  }

  // Waits for the kernels.
  void fetch() const {
#ifdef KFAC_WITH_CUDA
    if (!on_gpu) return;
    expect(cudaDeviceSynchronize(), "kernels");
    for (const Output& o : outputs_) expect(cudaMemcpy(o.host, o.data, o.bytes, cudaMemcpyDeviceToHost), "copy back");
#endif
  }

 private:
  struct Output {
    void *host, *data;
    size_t bytes;
  };

  void* copy(const void* from, size_t bytes) {
    void* const data = scratch(int64_t(bytes));
#ifdef KFAC_WITH_CUDA
    expect(cudaMemcpy(data, from, bytes, cudaMemcpyHostToDevice), "copy to the device");
#else
    memcpy(data, from, bytes);
#endif
    return data;
  }

  static void release(void* block) {
#ifdef KFAC_WITH_CUDA
    if (on_gpu) cudaFree(block);
#endif
    if (!on_gpu) std::free(block);
  }

  std::vector<void*> blocks_;
  std::vector<Output> outputs_;
};

// Runs the cases named on the command line (default: all); the exit code is 1 if one of them is not good.
inline int run(const char* name, const std::map<std::string, std::function<bool()>>& cases, int count, char** words) {
  std::vector<std::string> chosen;
  for (int i = 1; i < count; ++i) {
    if (std::string(words[i]) == "--device") {
      on_gpu = true;
    } else {
      chosen.push_back(words[i]);
    }
  }
#ifndef KFAC_WITH_CUDA
  if (on_gpu) {
    std::fprintf(stderr, "%s: built without CUDA\n", name);
    return 2;
  }
#endif
  if (chosen.empty()) {
    for (const auto& entry : cases) chosen.push_back(entry.first);
  }
  bool good = true;
  for (const std::string& one : chosen) {
    if (!cases.count(one)) {
      std::fprintf(stderr, "%s: no case %s\n", name, one.c_str());
      return 2;
    }
    good = cases.at(one)() && good;
  }
  return good ? 0 : 1;
}

}  // namespace program
