// The C interface: what a problem must be, and which family runs it.
#include <algorithm>
#include <string>

#include "family.h"

namespace slidesparse {

namespace {

constexpr int64_t kLargest = int64_t(1) << 30;  // tiles and rows are counted in int
constexpr int64_t kLargestExactK = 133'144;     // 127 * 127 * k fits in int32

std::string describe(const ss_fused_problem& p) {
  return "fused GEMM M=" + std::to_string(p.m) + " N=" + std::to_string(p.n) + " K=" + std::to_string(p.k) + " " +
         type_name(p.type);
}

void check_problem(const ss_fused_problem& p) {
  const auto refuse = [&](const std::string& reason) { throw Unsupported(describe(p) + ": " + reason); };
  if (p.type != SS_INT8 && p.type != SS_FP8_E4M3) refuse("only INT8 and FP8E4M3");
  if (p.m < 0 || p.m > kLargest || p.n < 8 || p.n > kLargest || p.k < 32 || p.k > kLargest)
    refuse("M must be 0 to 2^30, N 8 to 2^30, K 32 to 2^30");
  if (p.n % 8) refuse("N must be a multiple of 8");
  if (p.k % 32) refuse("K must be a multiple of 32");
  if (p.type == SS_INT8 && p.k > kLargestExactK) refuse("sums of more than 133144 products may not fit in int32");
}

void check_operands(const ss_fused_problem& p, const ss_fused_operands& o) {
  if (!o.x || !o.packed || !o.token_scale || !o.channel_scale || !o.out)
    throw Error(describe(p) + ": an operand is missing");
  for (const void* pointer : {o.x, o.packed, static_cast<const void*>(o.out)})
    if (reinterpret_cast<uintptr_t>(pointer) % 16)
      throw Error(describe(p) + ": x, packed and out must be aligned to 16 bytes");
  if (reinterpret_cast<uintptr_t>(o.bias) % 4) throw Error(describe(p) + ": bias must be aligned to 4 bytes");
}

bool is_wgmma(const ss_fused_problem& p) {
  if (p.family == SS_FUSED_WGMMA) return true;
  if (p.family == SS_FUSED_MMA) return false;
  throw Error(describe(p) + ": no family of number " + std::to_string(p.family));
}

}  // namespace

}  // namespace slidesparse

using namespace slidesparse;

extern "C" int ss_fused_abi_version(void) { return SS_FUSED_ABI_VERSION; }

extern "C" const char* ss_fused_error(void) { return ss_error(); }

extern "C" int ss_fused_configs(int capability, const ss_fused_problem* problem, ss_fused_config* list, int capacity,
                                int* found) {
  return guarded([&] {
    *found = 0;
    const auto configs = is_wgmma(*problem) ? wgmma_configs : mma_configs;
    check_problem(*problem);
    const std::vector<ss_fused_config> all = configs(capability, *problem);
    if (all.empty()) throw Unsupported(describe(*problem) + ": no tile fits it");
    *found = std::min(capacity, int(all.size()));
    std::copy_n(all.begin(), *found, list);
  });
}

extern "C" int ss_fused_gemm(const ss_fused_problem* problem, const ss_fused_config* config,
                             const ss_fused_operands* operands, void* stream) {
  return guarded([&] {
    const auto gemm = is_wgmma(*problem) ? wgmma_gemm : mma_gemm;
    check_problem(*problem);
    if (problem->m == 0) return;
    check_operands(*problem, *operands);
    gemm(*problem, *config, *operands, static_cast<cudaStream_t>(stream));
  });
}
