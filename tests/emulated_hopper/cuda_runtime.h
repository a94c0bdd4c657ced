// In place of CUDA's: what the host side of wgmma_gemm.cu calls. The emulated GPU runs a few blocks at a time.
#pragma once

#include <map>

#include "gpu.h"
#include "language.h"

#define __grid_constant__
// No macro: members of the host's structures have that name.
inline const struct {
  struct {
    operator int() const { return emulated::options().launch.blocks; }
  } x;
} gridDim;

// Of what a kernel declares `extern __shared__`, the beginning.
inline uint32_t __cvta_generic_to_shared(const void*) { return emulated::kSharedWindow; }
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration, cudaErrorLaunchFailure };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess, cudaDriverEntryPointSymbolNotFound };
enum { cudaEnableDefault };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
using cudaStream_t = struct Stream*;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaErrorInvalidConfiguration ? "invalid configuration" : emulated::state().error.c_str();
}
// GPUs of different sizes are different devices.
inline cudaError_t cudaGetDevice(int* device) { return *device = emulated::options().gpu_blocks, cudaSuccess; }

// Asked for by the host, by kernel.
inline std::map<const void*, int>& allowed_shared() {
  static std::map<const void*, int> bytes;
  return bytes;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute, int bytes) {
  if (bytes > emulated::kSharedBytes) return cudaErrorInvalidConfiguration;
  return allowed_shared()[reinterpret_cast<const void*>(kernel)] = bytes, cudaSuccess;
}

template <class Kernel>
bool can_launch(Kernel kernel, const cudaLaunchConfig_t& launch) {
  const auto& cluster = launch.attrs[0].val.clusterDim;
  return launch.numAttrs == 1 && launch.attrs[0].id == cudaLaunchAttributeClusterDimension && cluster.y == 1 &&
         cluster.z == 1 && cluster.x >= 1 && cluster.x <= emulated::kMostBlocks && launch.gridDim.x >= 1 &&
         launch.gridDim.x % cluster.x == 0 && launch.gridDim.y == 1 && launch.gridDim.z == 1 &&
         launch.blockDim.x <= emulated::kMostThreads && launch.blockDim.y == 1 && launch.blockDim.z == 1 &&
         launch.dynamicSmemBytes <= size_t(allowed_shared()[reinterpret_cast<const void*>(kernel)]);
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* found, Kernel kernel, const cudaLaunchConfig_t* launch) {
  if (!can_launch(kernel, *launch)) return cudaErrorInvalidConfiguration;
  return *found = emulated::options().gpu_blocks / int(launch->attrs[0].val.clusterDim.x), cudaSuccess;
}
template <class... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* launch, void (*kernel)(Given...), Given... given) {
  if (!can_launch(kernel, *launch)) return cudaErrorInvalidConfiguration;
  emulated::run_grid({int(launch->gridDim.x), int(launch->attrs[0].val.clusterDim.x), int(launch->blockDim.x),
                      int(launch->dynamicSmemBytes)},
                     [&] { kernel(given...); });
  return emulated::state().error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

// Only "cuTensorMapEncodeTiled" (interface.cpp).
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result);
