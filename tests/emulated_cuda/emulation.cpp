// What the emulated library has besides csrc/fused: no other family, and a way to look at and to set up the GPU.
#include "family.h"

namespace slidesparse::mma_sp {
__attribute__((aligned(1024))) uint8_t shared[kMostShared];
}

namespace slidesparse {

std::vector<ss_fused_config> wgmma_configs(int, const ss_fused_problem&) { throw Unsupported("not emulated"); }
void wgmma_gemm(const ss_fused_problem&, const ss_fused_config&, const ss_fused_operands&, cudaStream_t) {
  throw Unsupported("not emulated");
}

}  // namespace slidesparse

#pragma GCC visibility push(default)
extern "C" void emulated_seed(unsigned seed) { emulated::state().chance.seed(seed); }
extern "C" void emulated_readable(const void* begin, int64_t bytes) {
  const char* first = static_cast<const char*>(begin);
  if (bytes == 0) emulated::state().readable.clear();
  else emulated::state().readable.emplace_back(first, first + bytes);
}
extern "C" long long emulated_conflicts() { return emulated::state().conflicts; }
extern "C" long long emulated_wavefronts() { return emulated::state().wavefronts; }
#pragma GCC visibility pop
