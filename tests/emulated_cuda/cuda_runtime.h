// In place of CUDA's: what the host side of csrc/fused calls, and what device code of mma_sp.cuh uses without assembly.
#pragma once

#include <cstdint>
#include <cstring>

#include "emulation.h"

#define __device__
#define __global__
#define __shared__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
using std::min;

struct float2 {
  float x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct Index {
  int x;
};
#define threadIdx (Index{emulated::block().current})
#define blockIdx (Index{emulated::block().index})

inline void __trap() { emulated::complain("trap"); }
inline void __syncthreads() {
  emulated::meet(emulated::block().all, int(emulated::block().threads.size()), "__syncthreads", nullptr, [](auto&) {});
}
inline void __syncwarp() { emulated::meet_warp("__syncwarp", nullptr, [](auto&) {}); }
inline int __shfl_sync(unsigned, int value, int lane) {
  int found = value;
  using Mine = std::pair<int, int*>;
  Mine mine{value, &found};
  emulated::meet_warp("__shfl_sync", &mine, [lane](const std::vector<void*>& all) {
    for (void* one : all) *static_cast<Mine*>(one)->second = static_cast<Mine*>(all[lane])->first;
  });
  return found;
}
// Compiled without contraction: each of these is rounded.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }

enum cudaError_t { cudaSuccess, cudaErrorUnknown };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeRelaxed };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = struct Stream*;
struct cudaLaunchConfig_t {
  unsigned gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};
inline const char* cudaGetErrorString(cudaError_t) { return emulated::state().error.c_str(); }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  return *value = name == cudaDevAttrComputeCapabilityMajor ? 12 : 0, cudaSuccess;
}
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}

namespace slidesparse::mma_sp {
extern uint8_t shared[];  // what a kernel declares `extern __shared__`
}
constexpr size_t kMostShared = 99 * 1024;

template <class... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* launch, void (*kernel)(Given...), Given... given) {
  auto& state = emulated::state();
  state.error.clear();
  std::vector<int> blocks(launch->gridDim);
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = int(i);
  std::shuffle(blocks.begin(), blocks.end(), state.chance);
  for (int index : blocks) {
    std::memset(slidesparse::mma_sp::shared, 0xA5, kMostShared);
    emulated::run_block(index, int(launch->blockDim), [&] { kernel(given...); });
    for (size_t i = launch->dynamicSmemBytes; i < kMostShared; ++i)
      if (slidesparse::mma_sp::shared[i] != 0xA5) emulated::complain("shared memory beyond its own is written");
  }
  return state.error.empty() ? cudaSuccess : cudaErrorUnknown;
}
