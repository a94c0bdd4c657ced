// What the emulated library has besides csrc/fused: the driver's tensor maps, no other family, and a way to set up the
// GPU from outside.
#include "cudaTypedefs.h"
#include "family.h"

namespace {

// Refuses what the driver refuses, as far as two dimensions without interleaving go.
CUresult encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data, const cuuint64_t* sizes,
                const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave,
                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const int element = type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1 : 2;
  bool good = rank == 2 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && reinterpret_cast<uintptr_t>(map) % 64 == 0;
  for (int i = 0; i < 2; ++i)
    good = good && sizes[i] >= 1 && sizes[i] <= cuuint64_t(1) << 32 && box[i] >= 1 && box[i] <= 256 && steps[i] == 1;
  good = good && strides[0] % 16 == 0 && strides[0] < cuuint64_t(1) << 40 && strides[0] >= sizes[0] * element;
  good = good && swizzle == CU_TENSOR_MAP_SWIZZLE_128B && box[0] * element <= 128 && box[0] * element % 16 == 0;
  if (!good) return CUDA_ERROR_INVALID_VALUE;
  map->map = {static_cast<uint8_t*>(data), int64_t(sizes[0]), int64_t(sizes[1]), int64_t(strides[0]), element,
              int(box[0]), int(box[1])};
  return CUDA_SUCCESS;
}

}  // namespace

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool known = std::strcmp(name, "cuTensorMapEncodeTiled") == 0 && version == 12000;
  *function = known ? reinterpret_cast<void*>(encode) : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

namespace slidesparse {

namespace wgmma {
alignas(1024) uint8_t dynamic[1];  // what the kernel declares: its address stands for a block's shared memory
}

std::vector<ss_fused_config> mma_configs(int, const ss_fused_problem&) { throw Unsupported("not emulated"); }
void mma_gemm(const ss_fused_problem&, const ss_fused_config&, const ss_fused_operands&, cudaStream_t) {
  throw Unsupported("not emulated");
}

}  // namespace slidesparse

#pragma GCC visibility push(default)
extern "C" void emulated_seed(unsigned seed) { emulated::state().chance.seed(seed); }
extern "C" void emulated_gpu(int blocks) { emulated::options().gpu_blocks = blocks; }
extern "C" void emulated_fault(int number) { emulated::options().fault = number; }
extern "C" int emulated_launched_blocks() { return emulated::options().launch.blocks; }
extern "C" void emulated_readable(const void* begin, int64_t bytes) {
  const char* first = static_cast<const char*>(begin);
  if (bytes == 0) emulated::state().readable.clear();
  else emulated::state().readable.emplace_back(first, first + bytes);
}
#pragma GCC visibility pop
