// sm_90a: out[m, n] = bf16((acc[m, n] * token_scale[m]) * channel_scale[n] + bias[n]) for 2:4 weights of 8 bits.
//
// The tensor cores' operand a is the weight (it is the one that may be sparse), b are the tokens: a block makes a tile
// of out^T, [channels, tokens], and writes it the right way round.
//
//   memory -> copy engine -> stages in shared memory -> wgmma.sp -> registers -> scales, bias, bf16
//          -> transposed into a ring in shared memory -> copy engine -> memory
//
// A block has three warpgroups and walks over tiles until none is left. One thread of the last warpgroup orders the
// copies into the stages, as far ahead as there is room. The first two multiply: each has its own channels of the tile,
// both the same tokens. They need not keep step: the first has a head start, so that while one of them writes its part
// of out (and leaves the tensor cores alone) the other multiplies.
//
// Blocks of a cluster share what they load. Of cx blocks with the same tokens each loads a part of them and sends it to
// all; of ct blocks with the same channels likewise with the weights. Or (split) they share one tile along K, for few
// tokens: each adds up a part of the others' sums at the end.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>

#include <type_traits>

#include "wgmma_sp.cuh"

namespace slidesparse::wgmma {

constexpr int kBlockRows = 64;  // channels of a packed block: the M of wgmma
constexpr int kStageK = 128;    // of the lifted K, in elements and bytes of a token
constexpr int kValueBytes = kBlockRows * kStageK / 2;
constexpr int kBlockBytes = kValueBytes + kBlockRows * kStageK / 8;  // and 2 bits of metadata for each value
constexpr int kWarpgroup = 128;
constexpr int kMultiplying = 2;  // warpgroups
constexpr int kThreads = (kMultiplying + 1) * kWarpgroup;
constexpr int kChunkTokens = 32;  // of out that go to memory at a time, 64 channels each
constexpr int kRing = 3;          // chunks of a warpgroup on their way: the fewest that need one meeting a chunk
constexpr int kPackedRows = 256;  // packed weights are padded to a multiple: every tile lies inside
constexpr int kSharedBytes = 227 * 1024;
constexpr int kMaxStages = 8;

// Channel blocks of a warpgroup and tokens of a tile; from these the shared memory, in bytes.
template <int Type_, int Blocks_, int Tokens_>
struct Tile {
  static constexpr int Type = Type_, Blocks = Blocks_, Tokens = Tokens_;
  using Sum = std::conditional_t<Type == SS_INT8, int, float>;
  static constexpr int kBlocks = kMultiplying * Blocks, kChannels = kBlocks * kBlockRows;
  static constexpr int kTokenBytes = Tokens * kStageK, kWeightBytes = kBlocks * kBlockBytes;
  static constexpr int kStage = kTokenBytes + kWeightBytes;
  static constexpr int kChunk = kChunkTokens * kBlockRows * 2;
  // Of a warpgroup and tile: scales of tokens, scales and biases of channels.
  static constexpr int kOwnChannels = Blocks * kBlockRows;
  static constexpr int kScales = Tokens * 4 + kOwnChannels * 6;
  static constexpr int kFixed = kMultiplying * (kRing * kChunk + 2 * kScales) + (2 * kMaxStages + 1) * 8;
  static constexpr int kFitting = (kSharedBytes - kFixed) / kStage;
  static constexpr int kStages = kFitting < kMaxStages ? kFitting : kMaxStages;
  static constexpr int kRingAt = kStages * kStage, kScalesAt = kRingAt + kMultiplying * kRing * kChunk;
  static constexpr int kBarriersAt = kScalesAt + kMultiplying * 2 * kScales;
  static constexpr int kShared = kBarriersAt + (2 * kStages + 1) * 8;
  // With few sums to hold there are registers to spare for the warpgroup that orders copies.
  static constexpr int kMany = Blocks * Tokens > 320 ? 240 : 232, kFew = Blocks * Tokens > 320 ? 24 : 40;
  // Sums of the whole tile fit where the stages were.
  static constexpr bool kSplits = Tokens <= 128 && kChannels * Tokens * 4 <= kRingAt;
  static_assert(kStage % 1024 == 0 && kTokenBytes % 1024 == 0 && kRingAt % 1024 == 0, "swizzles count from these");
  static_assert(kStages >= 3 && kShared <= kSharedBytes && kScales % 16 == 0);
};

// By value to the kernel. Tiles are counted in clusters.
struct Params {
  const uint8_t* packed;  // [k_steps][row_blocks] blocks
  const float* token_scale;
  const float* channel_scale;
  const __nv_bfloat16* bias;
  int m, n, k_steps, row_blocks;
  int channel_tiles, token_tiles, group;
  int cx, ct, split, head_start;
};

#ifdef SS_HAS_WGMMA

// A block's place in its cluster.
struct Rank {
  uint32_t all, channel, token;
  int clusters, cluster;

  __device__ explicit Rank(const Params& p) : all(cluster_rank()), channel(all % p.cx), token(all / p.cx % p.ct) {
    const int blocks = p.cx * p.ct * p.split;
    clusters = gridDim.x / blocks;
    cluster = blockIdx.x / blocks;
  }
};

// Of tile `index` this block's part: its first channel block and its first token. `group` tiles of tokens are taken
// together with all channels before the next, so that their tokens and the weights stay in the L2 cache.
struct Place {
  int block, token;
};
template <class T>
__device__ Place place_of(const Params& p, const Rank& rank, int index) {
  const int of_group = p.channel_tiles * p.group, group = index / of_group, rest = index - group * of_group;
  const int width = min(p.group, p.token_tiles - group * p.group);
  const int channel_tile = (rest / width) * p.cx + rank.channel;
  const int token_tile = (group * p.group + rest % width) * p.ct + rank.token;
  return {channel_tile * T::kBlocks, token_tile * T::Tokens};
}

// The stages as a ring: which one is next, and the parity of its barriers.
template <class T>
struct Slot {
  int index = 0;
  uint32_t parity;

  __device__ void advance() {
    if (++index == T::kStages) {
      index = 0;
      parity ^= 1;
    }
  }
};

template <class T>
struct Shared {
  uint32_t base;  // stages: tokens [Tokens][128], 128-byte swizzle, then channel blocks

  __device__ uint32_t stage(int slot) const { return base + slot * T::kStage; }
  __device__ uint32_t weights(int slot) const { return stage(slot) + T::kTokenBytes; }
  __device__ uint32_t ring(int warpgroup) const { return base + T::kRingAt + warpgroup * kRing * T::kChunk; }
  __device__ uint32_t scales(int warpgroup, int parity) const {
    return base + T::kScalesAt + (warpgroup * 2 + parity) * T::kScales;
  }
  __device__ uint32_t full(int slot) const { return base + T::kBarriersAt + slot * 8; }
  __device__ uint32_t empty(int slot) const { return base + T::kBarriersAt + (T::kStages + slot) * 8; }
  __device__ uint32_t under_way() const { return base + T::kBarriersAt + 2 * T::kStages * 8; }
};

// K of this block: all of it, or its share.
__device__ int2 steps_of(const Params& p, const Rank& rank) {
  if (p.split == 1) return {0, p.k_steps};
  return {int(rank.all) * p.k_steps / p.split, int(rank.all + 1) * p.k_steps / p.split};
}

// -- one thread: the copies -------------------------------------------------------------------------------------------

template <class T>
__device__ void load(const Params& p, const CUtensorMap& x, const Shared<T>& shared, const Rank& rank) {
  // To whom parts go: weights to the blocks with the same channels, tokens to those with the same tokens.
  uint16_t same_channels = 0, same_tokens = 0;
  for (int t = 0; t < p.ct; ++t) same_channels |= 1 << (rank.channel + t * p.cx);
  for (int c = 0; c < p.cx; ++c) same_tokens |= 1 << (c + rank.token * p.cx);
  const int weight_part = T::kWeightBytes / p.ct, token_part = T::Tokens / p.cx;
  const int2 steps = steps_of(p, rank);
  Slot<T> slot{0, 1};  // a fresh barrier counts as having been through the phase before
  for (int tile = rank.cluster; tile < p.channel_tiles * p.token_tiles; tile += rank.clusters) {
    const Place at = place_of<T>(p, rank, tile);
    // A cluster may reach beyond the last channel: such a block multiplies anything, and nothing of it is written.
    const int block = at.block < p.row_blocks ? at.block : 0;
    const uint8_t* from = p.packed + (size_t(steps.x) * p.row_blocks + block) * kBlockBytes + rank.token * weight_part;
    const int first_token = at.token + rank.channel * token_part;
#pragma unroll 1
    for (int k = steps.x; k < steps.y; ++k, from += size_t(p.row_blocks) * kBlockBytes) {
      barrier_wait(shared.empty(slot.index), slot.parity);
      const uint32_t full = shared.full(slot.index);
      const uint32_t weights = shared.weights(slot.index) + rank.token * weight_part;
      const uint32_t tokens = shared.stage(slot.index) + rank.channel * token_part * kStageK;
      barrier_expect(full, T::kStage);
      if (p.ct == 1)
        bulk_load(weights, from, weight_part, full);
      else
        bulk_load_to(weights, from, weight_part, full, same_channels);
      if (p.cx == 1)
        box_load(tokens, &x, k * kStageK, first_token, full);
      else
        box_load_to(tokens, &x, k * kStageK, first_token, full, same_tokens);
      slot.advance();
    }
  }
}

// -- a warpgroup that multiplies --------------------------------------------------------------------------------------

// What it keeps from tile to tile.
template <class T>
struct Worker {
  const Params& p;
  const Shared<T>& shared;
  int warpgroup, thread;
  uint32_t release_at;  // where this lane says that a stage was read: the first `empty` of one block; 0: nowhere
  Slot<T> slot{0, 0};
  int chunk = 0, scales = 0, until_under_way;

  // A stage is free for those who write to it once every warp of all blocks that they write to has read it.
  __device__ Worker(const Params& p, const Shared<T>& shared, const Rank& rank, int warpgroup)
      : p(p), shared(shared), warpgroup(warpgroup), thread(threadIdx.x % kWarpgroup), release_at(0) {
    const int lane = threadIdx.x % 32;
    if (lane < p.cx)
      release_at = peer_address(shared.empty(0), p.split > 1 ? rank.all : lane + rank.token * p.cx);
    else if (lane < p.cx + p.ct && lane - p.cx != rank.token)
      release_at = peer_address(shared.empty(0), rank.channel + (lane - p.cx) * p.cx);
    until_under_way = warpgroup == 0 ? p.head_start : 0;
  }

  __device__ void release(int stage) const {
    if (release_at) barrier_arrive(release_at + stage * 8);
  }
};

// Scales and biases of a tile come to shared memory while it is multiplied.
template <class T>
__device__ void fetch_scales(const Worker<T>& w, int channel, int token) {
  const Params& p = w.p;
  const uint32_t tokens = w.shared.scales(w.warpgroup, w.scales);
  const uint32_t channels = tokens + T::Tokens * 4, biases = channels + T::kOwnChannels * 4;
  for (int i = w.thread; i < T::Tokens; i += kWarpgroup) {
    const bool there = token + i < p.m;
    copy4(tokens + i * 4, p.token_scale + (there ? token + i : 0), there);
  }
  if (w.thread < T::kOwnChannels) {
    const bool there = channel + w.thread < p.n;
    copy4(channels + w.thread * 4, p.channel_scale + (there ? channel + w.thread : 0), there);
  }
  if (p.bias && w.thread < T::kOwnChannels / 2) {
    const bool there = channel + w.thread * 2 < p.n;
    copy4(biases + w.thread * 4, p.bias + (there ? channel + w.thread * 2 : 0), there);
  }
}

// One stage: 2 steps of 64 along K for each channel block. The group before is waited for, this one stays under way.
template <class T>
__device__ void multiply_stage(Worker<T>& w, typename T::Sum (&d)[T::Blocks][T::Tokens / 2], uint2 (&metadata)[T::Blocks],
                               int& add, int& before) {
  barrier_wait(w.shared.full(w.slot.index), w.slot.parity);
  const uint32_t tokens = w.shared.stage(w.slot.index);
  const uint32_t weights = w.shared.weights(w.slot.index) + w.warpgroup * T::Blocks * kBlockBytes;
#pragma unroll
  for (int i = 0; i < T::Blocks; ++i)
    shared_load(metadata[i], weights + i * kBlockBytes + kValueBytes + w.thread * 8);
#pragma unroll
  for (int i = 0; i < T::Blocks; ++i)
#pragma unroll
    for (int j = 0; j < T::Tokens / 2; ++j) pin(d[i][j]);
  const uint64_t of_tokens = descriptor(tokens, kRows128);
  fence();
#pragma unroll
  for (int k = 0; k < 2; ++k)  // descriptors count in 16 bytes: 64 of the tokens, 32 of the kept values
#pragma unroll
    for (int i = 0; i < T::Blocks; ++i)
      SparseProduct<T::Type, T::Tokens>::issue(d[i], descriptor(weights + i * kBlockBytes, kRows64) + 2 * k,
                                               of_tokens + 4 * k, k ? metadata[i].y : metadata[i].x, k ? 1 : add);
  commit();
  wait<1>();
#pragma unroll
  for (int i = 0; i < T::Blocks; ++i)
#pragma unroll
    for (int j = 0; j < T::Tokens / 2; ++j) pin(d[i][j]);
  add = 1;
  if (before >= 0) w.release(before);
  before = w.slot.index;
  w.slot.advance();
  if (w.until_under_way && --w.until_under_way == 0 && w.thread == 0) barrier_arrive(w.shared.under_way());
}

template <class T>
__device__ void multiply_tile(Worker<T>& w, typename T::Sum (&d)[T::Blocks][T::Tokens / 2], int steps) {
  // wgmma reads its metadata registers while the next stage's are loaded: they take turns.
  uint2 even[T::Blocks], odd[T::Blocks];
  int add = 0, before = -1;
#pragma unroll 1
  for (int k = 0; k + 1 < steps; k += 2) {
    multiply_stage(w, d, even, add, before);
    multiply_stage(w, d, odd, add, before);
  }
  if (steps & 1) multiply_stage(w, d, even, add, before);
  wait<0>();
#pragma unroll
  for (int i = 0; i < T::Blocks; ++i)
#pragma unroll
    for (int j = 0; j < T::Tokens / 2; ++j) pin(d[i][j]);
  if (before >= 0) w.release(before);
  if (w.until_under_way && w.thread == 0) barrier_arrive(w.shared.under_way());  // a tile shorter than the head start
  w.until_under_way = 0;
}

// Scale and bias of one channel. Without a bias -0 is added, which changes no number, -0 and 0 among them.
struct Channel {
  float scale, bias;
};
template <class T>
__device__ Channel channel_of(const Worker<T>& w, int own_channel) {
  const uint32_t scales = w.shared.scales(w.warpgroup, w.scales) + T::Tokens * 4;
  Channel found{0.f, -0.f};
  shared_load(found.scale, scales + own_channel * 4);
  if (w.p.bias) {
    uint16_t bits;
    shared_load(bits, scales + T::kOwnChannels * 4 + own_channel * 2);
    found.bias = __uint_as_float(uint32_t(bits) << 16);
  }
  return found;
}

// The reference's order, each step rounded: (acc * token scale) * channel scale + bias.
template <class Sum>
__device__ float finished(Sum sum, float token_scale, const Channel& channel) {
  return __fadd_rn(__fmul_rn(__fmul_rn(float(sum), token_scale), channel.scale), channel.bias);
}
__device__ inline uint32_t two_bf16(float first, float second) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&two);
}

// 8 tokens from `token` of the tile, 16 channels a warp: the two matrices that stmatrix transposes. A lane holds sums of
// channels lane / 4 and 8 more, of tokens 2 * (lane % 4) and one more (PTX ISA, wgmma's accumulator layout).
template <class T>
__device__ void finish_group(const Worker<T>& w, const typename T::Sum* sums, int token, const Channel& low,
                             const Channel& high, uint32_t& a, uint32_t& b) {
  float2 scale;
  shared_load(scale, w.shared.scales(w.warpgroup, w.scales) + (token + threadIdx.x % 4 * 2) * 4);
  a = two_bf16(finished(sums[0], scale.x, low), finished(sums[1], scale.y, low));
  b = two_bf16(finished(sums[2], scale.x, high), finished(sums[3], scale.y, high));
}

// Channels of this warp in a chunk of 64, 16 bytes each: where row `token` of the chunk has them (128-byte swizzle).
__device__ inline uint32_t in_chunk(int token, int half) {
  const int piece = threadIdx.x % kWarpgroup / 32 * 2 + half;
  return token * 128 + ((piece ^ (token & 7)) << 4);
}

// The chunk in the ring is complete: send it. Thread 0 then knows that the chunk before the last has been read; the
// others know at the next meeting, and write to that place only after it.
template <class T>
__device__ void send_chunk(Worker<T>& w, const CUtensorMap& out, int channel, int token) {
  publish();
  warpgroup_sync(1 + w.warpgroup);
  if (w.thread == 0) {
    box_store(&out, channel, token, w.shared.ring(w.warpgroup) + w.chunk * T::kChunk);
    stores_read<1>();
  }
  w.chunk = w.chunk + 1 == kRing ? 0 : w.chunk + 1;
}

template <class T>
__device__ void write_tile(Worker<T>& w, const CUtensorMap& out, typename T::Sum (&d)[T::Blocks][T::Tokens / 2],
                           int channel, int token) {
  const int lane = threadIdx.x % 32, row = w.thread / 32 * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < T::Blocks; ++i) {
    const Channel low = channel_of(w, i * kBlockRows + row), high = channel_of(w, i * kBlockRows + row + 8);
#pragma unroll
    for (int q = 0; q < T::Tokens / kChunkTokens; ++q) {
      const uint32_t to = w.shared.ring(w.warpgroup) + w.chunk * T::kChunk;
#pragma unroll
      for (int g = 0; g < kChunkTokens / 8; g += 2) {
        const int group = q * (kChunkTokens / 8) + g;
        uint32_t a0, b0, a1, b1;
        finish_group(w, &d[i][group * 4], group * 8, low, high, a0, b0);
        finish_group(w, &d[i][group * 4 + 4], group * 8 + 8, low, high, a1, b1);
        store_transposed(to + in_chunk((g + lane / 16) * 8 + lane % 8, lane / 8 % 2), a0, b0, a1, b1);
      }
      send_chunk(w, out, channel + i * kBlockRows, token + q * kChunkTokens);
    }
  }
}

// Split along K: every block leaves its sums in shared memory (the stages are free by now), takes its share of the
// tokens, 8 at a time, and adds up what all have for them, always in the same order.
template <class T>
__device__ void write_shared_tile(Worker<T>& w, const CUtensorMap& out, typename T::Sum (&d)[T::Blocks][T::Tokens / 2],
                                  const Rank& rank, int channel, int token) {
  constexpr int kGroups = T::Tokens / 8;
  const auto place = [&](int i, int group) {
    return w.shared.base + (((w.warpgroup * T::Blocks + i) * kGroups + group) * kWarpgroup + w.thread) * 16;
  };
  warpgroups_sync(1 + kMultiplying);  // the other warpgroup may still be reading stages
#pragma unroll
  for (int i = 0; i < T::Blocks; ++i)
#pragma unroll
    for (int group = 0; group < kGroups; ++group)
      store4(place(i, group), &d[i][group * 4]);
  cluster_sync();
  const int lane = threadIdx.x % 32, row = w.thread / 32 * 16 + lane / 4, share = kGroups / w.p.split;
  for (int i = 0; i < T::Blocks; ++i) {
    const Channel low = channel_of(w, i * kBlockRows + row), high = channel_of(w, i * kBlockRows + row + 8);
    for (int group = int(rank.all) * share; group < int(rank.all + 1) * share; ++group) {
      typename T::Sum sums[4] = {};
      for (int peer = 0; peer < w.p.split; ++peer) {
        typename T::Sum part[4];
        peer_load4(part, peer_address(place(i, group), peer));
        for (int j = 0; j < 4; ++j) sums[j] += part[j];
      }
      uint32_t a, b;
      finish_group(w, sums, group * 8, low, high, a, b);
      store_transposed(w.shared.ring(w.warpgroup) + w.chunk * T::kChunk + in_chunk(lane % 8, lane / 8 % 2), a, b);
      send_chunk(w, out, channel + i * kBlockRows, token + group * 8);
    }
  }
}

template <class T>
__device__ void work(const Params& p, const CUtensorMap& out, const Shared<T>& shared, const Rank& rank,
                     int warpgroup) {
  Worker<T> w(p, shared, rank, warpgroup);
  if (warpgroup == 1 && p.head_start) barrier_wait(shared.under_way(), 0);
  const int2 steps = steps_of(p, rank);
  for (int tile = rank.cluster; tile < p.channel_tiles * p.token_tiles; tile += rank.clusters) {
    const Place at = place_of<T>(p, rank, tile);
    const int channel = (at.block + warpgroup * T::Blocks) * kBlockRows;
    fetch_scales(w, channel, at.token);
    typename T::Sum d[T::Blocks][T::Tokens / 2];
    multiply_tile(w, d, steps.y - steps.x);
    copies_done();
    warpgroup_sync(1 + warpgroup);
    if constexpr (T::kSplits) {
      if (p.split > 1) {
        write_shared_tile(w, out, d, rank, channel, at.token);
        continue;
      }
    }
    write_tile(w, out, d, channel, at.token);
    w.scales ^= 1;  // a warp may fetch the next tile's while another still reads these
  }
  if (w.thread == 0) stores_done();
}

#endif  // SS_HAS_WGMMA

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    sparse_gemm(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap out, const Params p) {
#ifdef SS_HAS_WGMMA
  extern __shared__ __align__(1024) uint8_t dynamic[];
  const Shared<T> shared{shared_address(dynamic)};
  if (shared.base % 1024 != 0) __trap();  // the swizzle pattern counts from multiples of 1024
  const Rank rank(p);
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < T::kStages; ++slot) {
      barrier_init(shared.full(slot), 1);
      barrier_init(shared.empty(slot), kMultiplying * 4 * (p.cx + p.ct - 1));
    }
    barrier_init(shared.under_way(), 1);
    barriers_ready();
    prefetch_map(&x);
    prefetch_map(&out);
  }
  __syncwarp();
  cluster_sync();
  const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / kWarpgroup, 0);
  if (warpgroup == kMultiplying) {
    fewer_registers<T::kFew>();
    if (threadIdx.x == kMultiplying * kWarpgroup) load(p, x, shared, rank);
    __syncwarp();
    if (T::kSplits && p.split > 1) cluster_sync();  // where the others exchange their sums
  } else {
    more_registers<T::kMany>();
    work(p, out, shared, rank, warpgroup);
    __syncwarp();
  }
  cluster_sync();  // no block may leave while another still sends to it or reads its sums
#else
  __trap();
#endif
}

}  // namespace slidesparse::wgmma
