// Host side of the mma.sp GEMM: its tiles, the ways to run a problem, the launch.
#include "mma_sp.cuh"

#include <algorithm>
#include <cstdio>
#include <mutex>
#include <set>
#include <string>
#include <utility>

#include "family.h"

namespace slidesparse {

namespace {

using namespace mma_sp;

using Kernel = void (*)(Params);

// A tile for both types. Kernels are told apart by their place in the table.
struct Entry {
  int channels, tokens, warps_k, stage_k, stages, threads, shared_bytes;
  Kernel int8, fp8;

  Kernel of(int type) const { return type == SS_INT8 ? int8 : fp8; }
};

// Sizes as in mma_sp::Tile.
template <int Channels, int Tokens, int WarpsC, int WarpsT, int WarpsK, int Stages>
Entry entry() {
  using Int8 = Tile<SS_INT8, Channels, Tokens, WarpsC, WarpsT, WarpsK, Stages>;
  using Fp8 = Tile<SS_FP8_E4M3, Channels, Tokens, WarpsC, WarpsT, WarpsK, Stages>;
  return {Channels,       Tokens,        WarpsK,           Int8::kStageK,   Stages,
          Int8::kThreads, Int8::kShared, sparse_gemm<Int8>, sparse_gemm<Fp8>};
}

// From many tokens to few. The first has the fewest bytes for an operation; the next three leave room for more than one
// block on a multiprocessor, so that one multiplies while another meets or writes (128x128: with four stages two on
// sm_80, with three also where there are only 100 KB). Those that split K have 27 to 60 KB on their way from memory,
// which is what it takes to be bound by its bandwidth and not by its latency; the narrow ones are for few channels.
const std::vector<Entry>& entries() {
  static const std::vector<Entry> all = {
      entry<256, 128, 4, 2, 1, 5>(), entry<128, 128, 2, 2, 1, 4>(), entry<128, 128, 2, 2, 1, 3>(),
      entry<128, 64, 2, 2, 1, 4>(),  entry<64, 64, 2, 2, 2, 6>(),   entry<32, 64, 2, 2, 2, 8>(),
      entry<64, 32, 2, 1, 4, 5>(),   entry<32, 32, 2, 1, 4, 6>(),   entry<16, 32, 1, 1, 4, 4>(),
      entry<64, 16, 2, 1, 4, 6>(),   entry<32, 16, 2, 1, 4, 8>(),   entry<16, 16, 1, 1, 4, 6>(),
  };
  return all;
}

int tiles(int64_t size, int tile) { return int((size + tile - 1) / tile); }
int packed_steps(const ss_fused_problem& p) { return tiles(p.k, kPackedSteps * kStepK) * kPackedSteps; }

ss_fused_config config_of(int index, int group) {
  const Entry& entry = entries()[index];
  ss_fused_config config{{}, index, entry.channels, entry.tokens, entry.stage_k, entry.stages, 1, 1, 1, group, 0};
  std::snprintf(config.name, sizeof config.name, "%dx%d.k%d.s%d.g%d", entry.channels, entry.tokens, entry.stage_k,
                entry.stages, group);
  return config;
}

// Why a way cannot run a problem; empty if it can.
std::string obstacle(const ss_fused_problem& p, const ss_fused_config& c) {
  if (c.index < 0 || c.index >= int(entries().size())) return "no kernel of this number";
  const Entry& entry = entries()[c.index];
  if (c.channels != entry.channels || c.tokens != entry.tokens || c.k != entry.stage_k || c.stages != entry.stages)
    return "its sizes are not those of this kernel";
  if (c.cluster_channels != 1 || c.cluster_tokens != 1 || c.split_k != 1 || c.head_start != 0)
    return "this family has no clusters, blocks that share a tile, or head start";
  if (c.group < 1 || c.group > 1024) return "tiles walked together must be 1 to 1024";
  if (int64_t(tiles(p.n, entry.channels)) * tiles(p.m, entry.tokens) > INT32_MAX) return "more tiles than a launch has";
  return "";
}

// While it lives, this thread may call what another thread's capture of a graph would otherwise forbid.
struct OutsideCaptures {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  OutsideCaptures() { check(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode"); }
  ~OutsideCaptures() { cudaThreadExchangeStreamCaptureMode(&mode); }
};

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute of device " + std::to_string(device));
  return value;
}

// Once for each kernel and device: loads it, and lets it have the shared memory that it needs.
void prepare(Kernel kernel, const Entry& entry, int type) {
  static std::mutex guard;
  static std::set<std::pair<int, Kernel>> ready;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(guard);
  if (ready.count({device, kernel})) return;
  const OutsideCaptures outside;
  const int capability = attribute(cudaDevAttrComputeCapabilityMajor, device) * 10 +
                         attribute(cudaDevAttrComputeCapabilityMinor, device);
  if (type == SS_FP8_E4M3 && capability < 89) throw Unsupported("FP8E4M3 needs compute capability 8.9 (Ada)");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, entry.shared_bytes),
        "cudaFuncSetAttribute of the fused GEMM");
  ready.insert({device, kernel});
}

}  // namespace

std::vector<ss_fused_config> mma_configs(int capability, const ss_fused_problem& p) {
  const std::string here = std::to_string(capability / 10) + "." + std::to_string(capability % 10);
  if (capability < 80) throw Unsupported("mma.sp needs compute capability 8.0 (Ampere), this is " + here);
  if (p.type == SS_FP8_E4M3 && capability < 89)
    throw Unsupported("FP8E4M3 needs compute capability 8.9 (Ada), this is " + here);
  // More than half of a tile is to be used, unless there is no smaller; those that split K are for few tokens: up to 32
  // in tiles of 16, 128 in tiles of 32, 512 in tiles of 64.
  constexpr int kFewest = 16;
  std::vector<ss_fused_config> found;
  for (int index = 0; index < int(entries().size()); ++index) {
    const Entry& entry = entries()[index];
    if (entry.tokens > kFewest && p.m <= entry.tokens / 2) continue;
    if (entry.warps_k > 1 && p.m > entry.tokens * entry.tokens / 8) continue;
    for (const int group : {8, 16}) {
      if (group > 8 && tiles(p.m, entry.tokens) <= 8) continue;
      const ss_fused_config config = config_of(index, group);
      if (obstacle(p, config).empty()) found.push_back(config);
    }
  }
  // The guess: 100 multiprocessors, each of which multiplies 4096 pairs a cycle and loads 40 bytes.
  const auto cycles = [&](const ss_fused_config& c) {
    const int64_t blocks = int64_t(tiles(p.n, c.channels)) * tiles(p.m, c.tokens), waves = (blocks + 99) / 100;
    return double(waves) * std::max(c.channels * c.tokens / 4096., (c.tokens + c.channels * 5 / 8.) / 40);
  };
  std::stable_sort(found.begin(), found.end(), [&](const auto& a, const auto& b) { return cycles(a) < cycles(b); });
  return found;
}

void mma_gemm(const ss_fused_problem& p, const ss_fused_config& c, const ss_fused_operands& o, cudaStream_t stream) {
  const std::string what = std::string("fused GEMM ") + c.name;
  const std::string reason = obstacle(p, c);
  if (!reason.empty()) throw Error(what + ": " + reason);
  const Entry& entry = entries()[c.index];
  const Kernel kernel = entry.of(p.type);
  prepare(kernel, entry, p.type);
  const int channel_tiles = tiles(p.n, entry.channels), token_tiles = tiles(p.m, entry.tokens);
  const Params params{static_cast<const uint8_t*>(o.x),
                      static_cast<const uint8_t*>(o.packed),
                      o.token_scale,
                      o.channel_scale,
                      static_cast<const __nv_bfloat16*>(o.bias),
                      static_cast<__nv_bfloat16*>(o.out),
                      int(p.m),
                      int(p.n),
                      int(p.k),
                      packed_steps(p),
                      tiles(p.n, kPackedRows) * (kPackedRows / kBlockRows),
                      channel_tiles,
                      token_tiles,
                      c.group};
  cudaLaunchConfig_t launch{};
  launch.gridDim = unsigned(channel_tiles) * token_tiles;
  launch.blockDim = entry.threads;
  launch.dynamicSmemBytes = entry.shared_bytes;
  launch.stream = stream;
  check(cudaLaunchKernelEx(&launch, kernel, params), what);
}

}  // namespace slidesparse
