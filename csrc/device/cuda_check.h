// What every call of the CUDA runtime goes through.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "status.h"

namespace slidesparse {

inline void check(cudaError_t status, const std::string& call) {
  if (status != cudaSuccess) throw Error("CUDA " + call + ": " + cudaGetErrorString(status));
}

}  // namespace slidesparse
