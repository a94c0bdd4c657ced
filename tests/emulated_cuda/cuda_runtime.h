// In place of CUDA's: what the host side of mma_sp.cu calls.
#pragma once

#include <cstdint>
#include <cstring>

#include "language.h"

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
