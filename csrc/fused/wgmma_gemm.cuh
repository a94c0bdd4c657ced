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
// both the same tokens.
//
// wgmma works beside the warps that asked for it, so the tensor cores need not stop while sums are written: where a
// warpgroup has two blocks of 64 channels, it multiplies the last stages of a tile for the first block, then for the
// second, and writes the first one's sums meanwhile. The two warpgroups need not keep step either: the first may have a
// head start of some stages.
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
constexpr int kRing = 2;          // chunks of out that a warpgroup has on their way to memory
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
  // Tokens of out that go to memory at a time, 64 channels each: as many as there is room for, since the warps meet and
  // wait for their stores each time.
  static constexpr int kChunkTokens = Tokens % 64 == 0 ? 64 : Tokens < 64 ? Tokens : Tokens / 2;
  static constexpr int kChunk = kChunkTokens * kBlockRows * 2;
  // Of a warpgroup and tile: scales of tokens, scales and biases of channels.
  static constexpr int kOwnChannels = Blocks * kBlockRows;
  static constexpr int kScales = Tokens * 4 + kOwnChannels * 6;
  static constexpr int kFixed = kMultiplying * (kRing * kChunk + kScales) + (2 * kMaxStages + 1) * 8;
  static constexpr int kFitting = (kSharedBytes - kFixed) / kStage;
  static constexpr int kStages = kFitting < kMaxStages ? kFitting : kMaxStages;
  // Stages at the end of a tile that two blocks take one after the other. They are all in shared memory until then.
  static constexpr int kTail = Blocks == 1 ? 0 : 2;
  static constexpr int kRingAt = kStages * kStage, kScalesAt = kRingAt + kMultiplying * kRing * kChunk;
  static constexpr int kBarriersAt = kScalesAt + kMultiplying * kScales;
  static constexpr int kShared = kBarriersAt + (2 * kStages + 1) * 8;
  // With few sums to hold there are registers to spare for the warpgroup that orders copies.
  static constexpr int kMany = Blocks * Tokens > 320 ? 240 : 232, kFew = Blocks * Tokens > 320 ? 24 : 40;
  // Sums of the whole tile fit where the stages were.
  static constexpr bool kSplits = Tokens <= 128 && kChannels * Tokens * 4 <= kRingAt;
  static_assert(kStage % 1024 == 0 && kTokenBytes % 1024 == 0 && kChunk % 1024 == 0, "swizzles count from these");
  static_assert(Tokens % kChunkTokens == 0);
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
  __device__ uint32_t scales(int warpgroup) const { return base + T::kScalesAt + warpgroup * T::kScales; }
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
  Slot<T> slot{0, 0}, read{0, 0};  // the stage that comes next, and the first that is not released
  int chunk = 0, until_under_way;

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

  __device__ void release() {
    if (release_at) barrier_arrive(release_at + read.index * 8);
    read.advance();
  }
  // The head start is over after so many stages, or with the tile.
  __device__ void under_way(int stages) {
    if (until_under_way == 0) return;
    until_under_way -= min(stages, until_under_way);
    if (until_under_way == 0 && thread == 0) barrier_arrive(shared.under_way());
  }
};

// Scales and biases of a tile come to shared memory while it is multiplied. Those of the tile before are not read any
// more: the warps have met since.
template <class T>
__device__ void fetch_scales(const Worker<T>& w, int channel, int token) {
  const Params& p = w.p;
  const uint32_t tokens = w.shared.scales(w.warpgroup);
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

template <class T>
using Sums = typename T::Sum[T::Tokens / 2];  // of one block of channels

template <class T>
__device__ void pin_all(Sums<T>& d) {
#pragma unroll
  for (int j = 0; j < T::Tokens / 2; ++j) pin(d[j]);
}

// Metadata of block `i` in a stage: a register for each step of 64 along K. wgmma reads it while it works.
template <class T>
__device__ void load_metadata(const Worker<T>& w, int slot, int i, uint2& metadata) {
  const uint32_t weights = w.shared.weights(slot) + (w.warpgroup * T::Blocks + i) * kBlockBytes;
  shared_load(metadata, weights + kValueBytes + w.thread * 8);
}

// One stage for block `i`: 2 steps of 64 along K. Without `add` the sums begin anew.
template <class T>
__device__ void issue(const Worker<T>& w, int slot, int i, Sums<T>& d, const uint2& metadata, int add) {
  const uint32_t weights = w.shared.weights(slot) + (w.warpgroup * T::Blocks + i) * kBlockBytes;
  const uint64_t of_weights = descriptor(weights, kRows64), of_tokens = descriptor(w.shared.stage(slot), kRows128);
#pragma unroll
  for (int k = 0; k < 2; ++k)  // descriptors count in 16 bytes: 64 of the tokens, 32 of the kept values
    SparseProduct<T::Type, T::Tokens>::issue(d, of_weights + 2 * k, of_tokens + 4 * k, k ? metadata.y : metadata.x,
                                             k ? 1 : add);
}

// Stage k, for all blocks. The group before is waited for, this one stays under way.
template <class T>
__device__ void multiply_stage(Worker<T>& w, Sums<T> (&d)[T::Blocks], uint2 (&metadata)[T::Blocks], int k) {
  barrier_wait(w.shared.full(w.slot.index), w.slot.parity);
#pragma unroll
  for (int i = 0; i < T::Blocks; ++i) load_metadata(w, w.slot.index, i, metadata[i]);
#pragma unroll
  for (int i = 0; i < T::Blocks; ++i) pin_all<T>(d[i]);
  fence();
#pragma unroll
  for (int i = 0; i < T::Blocks; ++i) issue(w, w.slot.index, i, d[i], metadata[i], k > 0);
  commit();
  wait<1>();
#pragma unroll
  for (int i = 0; i < T::Blocks; ++i) pin_all<T>(d[i]);
  if (k > 0) w.release();
  w.slot.advance();
  w.under_way(1);
}

// All stages but the tail. The last group stays under way.
template <class T>
__device__ void multiply_tile(Worker<T>& w, Sums<T> (&d)[T::Blocks], uint2 (&even)[T::Blocks], uint2 (&odd)[T::Blocks],
                              int steps) {
  int k = 0;
#pragma unroll 1
  for (; k + 1 < steps - T::kTail; k += 2) {  // wgmma reads its metadata registers while the next stage's are loaded
    multiply_stage(w, d, even, k);
    multiply_stage(w, d, odd, k + 1);
  }
  if (k < steps - T::kTail) multiply_stage(w, d, even, k);
}

// The last stages of a tile for its first block, whose sums are then there, and one group with all of them for the
// second, which stays under way.
template <class T>
__device__ void multiply_tail(Worker<T>& w, Sums<T> (&d)[T::Blocks], uint2 (&metadata)[T::kTail + 1][2], int steps) {
  const bool alone = steps == T::kTail;
  int slots[T::kTail + 1];
#pragma unroll
  for (int k = 0; k < T::kTail; ++k) {
    slots[k] = w.slot.index;
    barrier_wait(w.shared.full(w.slot.index), w.slot.parity);
    load_metadata(w, w.slot.index, 0, metadata[k][0]);
    load_metadata(w, w.slot.index, 1, metadata[k][1]);
    pin_all<T>(d[0]);
    fence();
    issue(w, w.slot.index, 0, d[0], metadata[k][0], k > 0 || !alone);
    commit();
    wait<1>();
    pin_all<T>(d[0]);
    if (k == 0 && !alone) w.release();
    w.slot.advance();
    w.under_way(1);
  }
  pin_all<T>(d[1]);
  fence();  // PTX asks for none here: the compiler does
#pragma unroll
  for (int k = 0; k < T::kTail; ++k) issue(w, slots[k], 1, d[1], metadata[k][1], k > 0 || !alone);
  commit();
  wait<1>();
  pin_all<T>(d[0]);
}

// All sums are there, all stages read.
template <class T>
__device__ void finish(Worker<T>& w, Sums<T> (&d)[T::Blocks]) {
  wait<0>();
#pragma unroll
  for (int i = T::kTail > 0; i < T::Blocks; ++i) pin_all<T>(d[i]);
#pragma unroll
  for (int k = 0; k < (T::kTail > 0 ? T::kTail : 1); ++k) w.release();
}

// Scale and bias of one channel. Without a bias -0 is added, which changes no number, -0 and 0 among them.
struct Channel {
  float scale, bias;
};
template <class T>
__device__ Channel channel_of(const Worker<T>& w, int own_channel) {
  const uint32_t scales = w.shared.scales(w.warpgroup) + T::Tokens * 4;
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

// Channels of this warp in a chunk of 64, 16 bytes each: where row `token` of the chunk has them (128-byte swizzle).
__device__ inline uint32_t in_chunk(int token, int half) {
  const int piece = threadIdx.x % kWarpgroup / 32 * 2 + half;
  return token * 128 + ((piece ^ (token & 7)) << 4);
}

// What a lane needs of a block of 64 channels. It holds sums of channels lane / 4 and 8 more of the 16 of its warp, of
// two tokens of every 8 (PTX ISA, wgmma's accumulator layout).
template <class T>
struct Part {
  Channel low, high;
  uint32_t scales;  // of its first token

  __device__ Part(const Worker<T>& w, int i) {
    const int lane = threadIdx.x % 32, row = i * kBlockRows + w.thread / 32 * 16 + lane / 4;
    low = channel_of(w, row);
    high = channel_of(w, row + 8);
    scales = w.shared.scales(w.warpgroup) + lane % 4 * 8;
  }
  __device__ float2 scales_of(int group) const {
    float2 two;
    shared_load(two, scales + group * 32);
    return two;
  }
  // The two matrices that stmatrix transposes, [8 channels, 8 tokens].
  __device__ void finish(const float2& scale, const typename T::Sum* sums, uint32_t& a, uint32_t& b) const {
    a = two_bf16(finished(sums[0], scale.x, low), finished(sums[1], scale.y, low));
    b = two_bf16(finished(sums[2], scale.x, high), finished(sums[3], scale.y, high));
  }
};

// The chunk in the ring is complete: send it. Thread 0 knows by then that the chunk before has been read, and so do the
// others after they have met: they write to its place next.
template <class T>
__device__ void send_chunk(Worker<T>& w, const CUtensorMap& out, int channel, int token) {
  publish();
  if (w.thread == 0) stores_read<kRing - 2>();
  warpgroup_sync(1 + w.warpgroup);
  if (w.thread == 0) box_store(&out, channel, token, w.shared.ring(w.warpgroup) + w.chunk * T::kChunk);
  w.chunk = w.chunk + 1 == kRing ? 0 : w.chunk + 1;
}

template <class T>
__device__ void write_block(Worker<T>& w, const CUtensorMap& out, int i, const Sums<T>& d, int channel, int token) {
  constexpr int kGroups = T::kChunkTokens / 8;
  const Part<T> part(w, i);
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int q = 0; q < T::Tokens / T::kChunkTokens; ++q) {
    const uint32_t to = w.shared.ring(w.warpgroup) + w.chunk * T::kChunk;
#pragma unroll
    for (int g = 0; g < kGroups; g += 2) {
      const int group = q * kGroups + g;
      uint32_t a0, b0, a1, b1;
      part.finish(part.scales_of(group), &d[group * 4], a0, b0);
      part.finish(part.scales_of(group + 1), &d[group * 4 + 4], a1, b1);
      store_transposed(to + in_chunk((g + lane / 16) * 8 + lane % 8, lane / 8 % 2), a0, b0, a1, b1);
    }
    send_chunk(w, out, channel + i * kBlockRows, token + q * T::kChunkTokens);
  }
}

// Split along K: every block leaves its sums in shared memory (the stages are free by now), takes its share of the
// tokens, 8 at a time, and adds up what all have for them, always in the same order.
template <class T>
__device__ void write_shared_tile(Worker<T>& w, const CUtensorMap& out, Sums<T> (&d)[T::Blocks], const Rank& rank,
                                  int channel, int token) {
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
  const int lane = threadIdx.x % 32;
  const int first = int(rank.all) * kGroups / w.p.split, last = int(rank.all + 1) * kGroups / w.p.split;
  for (int i = 0; i < T::Blocks; ++i) {
    const Part<T> part(w, i);
    for (int group = first; group < last; ++group) {
      typename T::Sum sums[4] = {};
      for (int peer = 0; peer < w.p.split; ++peer) {
        typename T::Sum of_peer[4];
        peer_load4(of_peer, peer_address(place(i, group), peer));
        for (int j = 0; j < 4; ++j) sums[j] += of_peer[j];
      }
      uint32_t a, b;
      part.finish(part.scales_of(group), sums, a, b);
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
  const int2 range = steps_of(p, rank);
  const int steps = range.y - range.x;
  Sums<T> d[T::Blocks];
  uint2 even[T::Blocks], odd[T::Blocks], tail[T::kTail + 1][2];  // metadata: in use until wgmma is waited for
  for (int tile = rank.cluster; tile < p.channel_tiles * p.token_tiles; tile += rank.clusters) {
    const Place at = place_of<T>(p, rank, tile);
    const int channel = (at.block + warpgroup * T::Blocks) * kBlockRows;
    fetch_scales(w, channel, at.token);
    multiply_tile(w, d, even, odd, steps);
    if constexpr (T::kTail > 0) multiply_tail(w, d, tail, steps);
    else finish(w, d);
    w.under_way(w.until_under_way);  // a tile shorter than the head start
    copies_done();
    warpgroup_sync(1 + warpgroup);
    if constexpr (T::kSplits) {
      if (p.split > 1) {
        if constexpr (T::kTail > 0) finish(w, d);
        write_shared_tile(w, out, d, rank, channel, at.token);
        break;  // the only one
      }
    }
    write_block(w, out, 0, d[0], channel, at.token);
    if constexpr (T::kTail > 0) finish(w, d);
    if constexpr (T::Blocks == 2) write_block(w, out, 1, d[1], channel, at.token);
  }
  if (w.thread == 0) stores_read<0>();
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
  if (p.cx * p.ct > 1)
    cluster_sync();  // blocks send to each other's barriers
  else
    block_sync();
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
