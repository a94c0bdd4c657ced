// What each family of kernels gives the C interface: the ways to run a problem, and the launch of one of them.
#pragma once

#include <vector>

#include "../device/cuda_check.h"
#include "slidesparse_fused.h"

namespace slidesparse {

// Problems come checked (fused.cu), so do the operands' addresses. `*_configs` ask no GPU and give a good guess first;
// they throw Unsupported, with the reason, for a compute capability (90 for 9.0) that the family has no kernel for.
// `*_gemm` launch on the current device without waiting; they throw Error for a config that is not of their tables.
std::vector<ss_fused_config> wgmma_configs(int capability, const ss_fused_problem& problem);
void wgmma_gemm(const ss_fused_problem& problem, const ss_fused_config& config, const ss_fused_operands& operands,
                cudaStream_t stream);

std::vector<ss_fused_config> mma_configs(int capability, const ss_fused_problem& problem);
void mma_gemm(const ss_fused_problem& problem, const ss_fused_config& config, const ss_fused_operands& operands,
              cudaStream_t stream);

}  // namespace slidesparse
