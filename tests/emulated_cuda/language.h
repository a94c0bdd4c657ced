// CUDA's C++ as far as device code of csrc/fused uses it without assembly.
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

struct int2 {
  int x, y;
};
struct uint2 {
  uint32_t x, y;
};
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
