// Host side of the Hopper GEMM: its tiles, the ways to run a problem, the launch.
#include <cudaTypedefs.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <mutex>
#include <string>
#include <tuple>

#include "family.h"
#include "wgmma_gemm.cuh"

namespace slidesparse {

namespace {

using namespace wgmma;

using Kernel = void (*)(CUtensorMap, CUtensorMap, Params);

// A tile for both types. Kernels are told apart by their place in the table.
struct Entry {
  int channels, tokens, chunk, stages, tail, shared_bytes;
  bool splits;
  Kernel int8, fp8;

  Kernel of(int type) const { return type == SS_INT8 ? int8 : fp8; }
};

template <int Blocks, int Tokens>
Entry entry() {
  using T = Tile<SS_INT8, Blocks, Tokens>;
  return {T::kChannels, T::Tokens, T::kChunkTokens, T::kStages, T::kTail, T::kShared, T::kSplits, sparse_gemm<T>,
          sparse_gemm<Tile<SS_FP8_E4M3, Blocks, Tokens>>};
}

// Large ones move the fewest bytes for an operation; small ones fill a GPU when there are few tokens or channels.
const std::vector<Entry>& entries() {
  static const std::vector<Entry> all = {
      entry<2, 192>(), entry<2, 160>(), entry<2, 128>(), entry<2, 96>(), entry<2, 64>(), entry<1, 256>(),
      entry<1, 192>(), entry<1, 128>(), entry<1, 96>(),  entry<1, 64>(), entry<1, 32>(),
  };
  return all;
}

struct Cluster {
  int channels, tokens, split;
};

std::string name_of(const ss_fused_config& c) {
  std::string name = std::to_string(c.channels) + "x" + std::to_string(c.tokens);
  if (c.cluster_channels * c.cluster_tokens > 1)
    name += ".c" + std::to_string(c.cluster_channels) + "x" + std::to_string(c.cluster_tokens);
  if (c.split_k > 1) name += ".k" + std::to_string(c.split_k);
  return name + ".g" + std::to_string(c.group) + ".h" + std::to_string(c.head_start);
}

ss_fused_config config_of(int index, Cluster cluster, int group, int head_start) {
  const Entry& entry = entries()[index];
  ss_fused_config config{{},
                         index,
                         entry.channels,
                         entry.tokens,
                         kStageK,
                         entry.stages,
                         cluster.channels,
                         cluster.tokens,
                         cluster.split,
                         group,
                         head_start};
  std::snprintf(config.name, sizeof config.name, "%s", name_of(config).c_str());
  return config;
}

int k_steps(const ss_fused_problem& p) { return int((p.k + kStageK - 1) / kStageK); }
int tiles(int64_t size, int tile) { return int((size + tile - 1) / tile); }

// Why a way cannot run a problem; empty if it can.
std::string obstacle(const ss_fused_problem& p, const ss_fused_config& c) {
  if (c.index < 0 || c.index >= int(entries().size())) return "no kernel of this number";
  const Entry& entry = entries()[c.index];
  const int blocks = entry.channels / kBlockRows, shared = c.cluster_channels * c.cluster_tokens;
  if (c.channels != entry.channels || c.tokens != entry.tokens || c.stages != entry.stages || c.k != kStageK)
    return "its sizes are not those of this kernel";
  if (c.cluster_channels < 1 || c.cluster_tokens < 1 || c.split_k < 1 || c.group < 1) return "a size below 1";
  if (shared * c.split_k > 8) return "clusters have at most 8 blocks";
  if (c.split_k > 1 && (shared > 1 || !entry.splits || c.split_k > entry.tokens / 8 || c.split_k > k_steps(p)))
    return "this tile cannot be split so";
  if (k_steps(p) / c.split_k < entry.tail) return "K is too short for this tile";
  if (blocks % c.cluster_tokens || entry.tokens % (8 * c.cluster_channels)) return "parts of a tile are not whole";
  // Waiting for the first warpgroup must not need a stage that only the second would free.
  if (c.head_start < 0 || c.head_start >= entry.stages) return "the head start is longer than the stages";
  return "";
}

constexpr int kMultiprocessors = 132;  // of an H200

// A guess of the cycles that a way takes, to have the likely ones first: what is tuned is measured. A stage takes as
// long as its products (shared memory bounds them at about 1.25 times the tensor cores' time) or its bytes: from the L2
// cache, weights that few tiles of tokens take from memory. Blocks that split K exchange their sums.
double guess(const ss_fused_problem& p, const ss_fused_config& c) {
  constexpr double kFromCache = 40, kFromMemory = 17, kExchanged = 32;  // bytes a cycle and multiprocessor, of an H200
  const int token_tiles = tiles(p.m, c.tokens * c.cluster_tokens);
  const double tile = double(c.channels) * c.tokens;
  const double weights = c.channels * 80.0 / c.cluster_tokens / std::min(kFromCache, kFromMemory * token_tiles);
  const double stage = std::max(tile / 64 * 1.25, weights + c.tokens * 128.0 / c.cluster_channels / kFromCache);
  const double exchange = c.split_k > 1 ? 2 * 4 * tile / kExchanged : 0;
  const int64_t blocks = int64_t(tiles(p.n, c.channels * c.cluster_channels)) * c.cluster_channels * token_tiles *
                         c.cluster_tokens * c.split_k;
  const int64_t rounds = (blocks + kMultiprocessors - 1) / kMultiprocessors;
  return double(rounds) * (double(k_steps(p)) / c.split_k * stage + tile / 20 + exchange + 1500);
}

PFN_cuTensorMapEncodeTiled_v12000 map_encoder() {
  static const auto found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result) !=
            cudaSuccess ||
        result != cudaDriverEntryPointSuccess)
      throw Error("CUDA cuTensorMapEncodeTiled: the driver has none; it needs CUDA 12.0 or later");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return found;
}

// A row-major [rows, columns] matrix that is copied in boxes with rows of 128 bytes, swizzled.
CUtensorMap map_of(const void* data, CUtensorMapDataType type, int element_bytes, int64_t rows, int64_t columns,
                   int box_rows) {
  CUtensorMap map;
  const cuuint64_t sizes[2] = {cuuint64_t(columns), cuuint64_t(rows)};
  const cuuint64_t strides[1] = {cuuint64_t(columns) * element_bytes};
  const cuuint32_t box[2] = {cuuint32_t(128 / element_bytes), cuuint32_t(box_rows)}, steps[2] = {1, 1};
  const CUresult status = map_encoder()(&map, type, 2, const_cast<void*>(data), sizes, strides, box, steps,
                                        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw Error("CUDA cuTensorMapEncodeTiled: status " + std::to_string(status) + " for a matrix of " +
                std::to_string(rows) + "x" + std::to_string(columns));
  return map;
}

struct Launch {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute cluster{};

  Launch(const Entry& entry, int cluster_blocks, cudaStream_t stream) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {unsigned(cluster_blocks), 1, 1};
    config.blockDim = kThreads;
    config.dynamicSmemBytes = entry.shared_bytes;
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
};

// Clusters of a kernel that this GPU runs at the same time: asked once, since asking takes as long as a launch.
int clusters_at_once(Kernel kernel, const Entry& entry, int cluster_blocks) {
  static std::mutex guard;
  static std::map<std::tuple<int, Kernel, int>, int> known;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(guard);
  int& clusters = known[{device, kernel, cluster_blocks}];
  if (clusters == 0) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, entry.shared_bytes),
          "cudaFuncSetAttribute of the fused GEMM");
    Launch launch(entry, cluster_blocks, nullptr);
    launch.config.gridDim = cluster_blocks;
    int found = 0;
    check(cudaOccupancyMaxActiveClusters(&found, kernel, &launch.config), "cudaOccupancyMaxActiveClusters");
    if (found == 0) throw Unsupported("this GPU has no room for clusters of " + std::to_string(cluster_blocks));
    clusters = found;
  }
  return clusters;
}

}  // namespace

std::vector<ss_fused_config> wgmma_configs(int capability, const ss_fused_problem& p) {
  if (capability / 10 != 9) throw Unsupported("wgmma needs compute capability 9.0 (Hopper)");
  static const Cluster together[] = {{2, 1, 1}, {1, 2, 1}, {1, 1, 1}};
  static const Cluster split[] = {{1, 1, 1}, {1, 1, 2}, {1, 1, 4}, {1, 1, 8}};
  // Between those, to fill a GPU that they would fill by half; more blocks than fit at once are never faster.
  static const Cluster between[] = {{1, 1, 3}, {1, 1, 5}, {1, 1, 6}};
  std::vector<ss_fused_config> found;
  const auto offer = [&](const ss_fused_config& config) {
    const auto same = [&](const ss_fused_config& other) { return std::string(other.name) == config.name; };
    if (obstacle(p, config).empty() && std::none_of(found.begin(), found.end(), same)) found.push_back(config);
  };
  for (int index = 0; index < int(entries().size()); ++index) {
    const Entry& entry = entries()[index];
    if (p.m <= 512 && entry.tokens <= 128 && entry.tokens - 32 < p.m) {  // no smaller tile holds all tokens
      for (const Cluster& cluster : split) offer(config_of(index, cluster, 8, cluster.split == 1 ? 2 : 0));
      for (const Cluster& cluster : between)
        if (tiles(p.n, entry.channels) * tiles(p.m, entry.tokens) * cluster.split <= kMultiprocessors)
          offer(config_of(index, cluster, 8, 0));
    }
    if (p.m > 128 && entry.tokens >= (p.m <= 512 ? 96 : 128))
      for (const Cluster& cluster : together) {
        const int tokens = cluster.tokens * entry.tokens;
        if (tokens < 2 * p.m) offer(config_of(index, cluster, 8, 2));
        if (tiles(p.m, tokens) > 8) offer(config_of(index, cluster, 16, 2));  // of fewer it is the same walk
      }
  }
  std::stable_sort(found.begin(), found.end(), [&](const ss_fused_config& a, const ss_fused_config& b) {
    return guess(p, a) < guess(p, b);
  });
  return found;
}

void wgmma_gemm(const ss_fused_problem& p, const ss_fused_config& c, const ss_fused_operands& o, cudaStream_t stream) {
  const std::string what = std::string("fused GEMM ") + c.name;
  const std::string reason = obstacle(p, c);
  if (!reason.empty()) throw Error(what + ": " + reason);
  const Entry& entry = entries()[c.index];
  const Kernel kernel = entry.of(p.type);
  const int cluster_blocks = c.cluster_channels * c.cluster_tokens * c.split_k;
  const int channel_tiles = tiles(p.n, entry.channels * c.cluster_channels);
  const int token_tiles = tiles(p.m, entry.tokens * c.cluster_tokens);
  const CUtensorMap x = map_of(o.x, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, p.m, p.k, entry.tokens / c.cluster_channels);
  const CUtensorMap out =
      map_of(o.out, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, p.m, p.n, c.split_k > 1 ? 8 : entry.chunk);
  const Params params{static_cast<const uint8_t*>(o.packed),
                      o.token_scale,
                      o.channel_scale,
                      static_cast<const __nv_bfloat16*>(o.bias),
                      int(p.m),
                      int(p.n),
                      k_steps(p),
                      tiles(p.n, kPackedRows) * (kPackedRows / kBlockRows),
                      channel_tiles,
                      token_tiles,
                      c.group,
                      c.cluster_channels,
                      c.cluster_tokens,
                      c.split_k,
                      c.head_start};
  // Blocks that share a tile wait for each other, so all of them must run; other clusters walk over what there is.
  const int at_once = clusters_at_once(kernel, entry, cluster_blocks), all = channel_tiles * token_tiles;
  Launch launch(entry, cluster_blocks, stream);
  launch.config.gridDim = unsigned((c.split_k > 1 ? all : std::min(all, at_once)) * cluster_blocks);
  check(cudaLaunchKernelEx(&launch.config, kernel, x, out, params), what);
}

}  // namespace slidesparse
