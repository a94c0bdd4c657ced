// What the two instruction families share: the kernels' arguments, how the threads of a block part, the launch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "cuda_check.h"
#include "slidesparse_peak.h"

namespace slidesparse {

// By value to the kernel.
struct Launch {
  const uint8_t* a;
  const uint8_t* b;
  const uint32_t* metadata;
  const uint8_t* source;  // nullptr: no loads
  size_t source_bytes;
  unsigned long long* loaded;
  void* out;
  int units;
  int iterations;
};

// Int8 sums are int32, all others float32.
template <int Type>
struct SumOf {
  using Sum = float;
};
template <>
struct SumOf<SS_INT8> {
  using Sum = int;
};

// Where a block starts to read `source`, and how it goes on: blocks are far apart, and each walks over all of it, so
// that the bytes come from the L2 cache and not from the multiprocessor's own.
struct Walk {
  size_t offset, end;

  __device__ Walk(size_t bytes, size_t piece)
      : offset((blockIdx.x * size_t(7919) * 128) % (bytes - piece) & ~size_t(127)), end(bytes - piece) {}

  __device__ size_t next(size_t piece) {
    const size_t here = offset;
    offset = offset + piece <= end ? offset + piece : 0;
    return here;
  }
};

// Threads that multiply count themselves out in shared memory; threads that load stop when the last of them has.
__device__ inline bool running(const int* finished, int units) {
  return *reinterpret_cast<const volatile int*>(finished) < units;
}

// Start `kernel` with one block on each multiprocessor of the current device.
template <class Kernel>
void start(Kernel kernel, const ss_peak_form& form, const Launch& launch, int blocks, int threads, int shared_bytes,
           void* stream) {
  const std::string call = std::string("launch of ") + form.instruction;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), call);
  kernel<<<blocks, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(launch);
  check(cudaGetLastError(), call);
}

// Defined by each family. Throw Error for a form that the family does not have.
void start_wgmma(const ss_peak_form& form, const Launch& launch, int blocks, void* stream);
void start_mma_sync(const ss_peak_form& form, const Launch& launch, int blocks, void* stream);

}  // namespace slidesparse
