// sm_80 and later: out[m, n] = bf16((acc[m, n] * token_scale[m]) * channel_scale[n] + bias[n]), weights 2:4 of 8 bits.
//
// The tensor cores' operand a is the weight (it is the one that may be sparse), b are the tokens: a block makes a tile
// of out^T, [channels, tokens], and writes it the right way round.
//
//   memory -> cp.async -> stages in shared memory -> registers -> mma.sp -> registers
//          -> scales, bias, bf16 -> transposed in registers and in shared memory -> memory
//
// The warps of a block share a tile in three ways: by channels, by tokens, and (for few tokens, where a tile is small
// and its weights are all there is to wait for) along K: each of those multiplies another step of every stage, and one
// of them adds up the others' sums at the end, always in the same order.
//
// A step is 64 of the lifted K, one instruction for each 16 channels and 8 tokens. Weights are packed so that registers
// of operand a lie together, thread by thread (kernels/fused_pack_mma.py); tokens are rows, swizzled so that neither
// copies nor ldmatrix meet bank conflicts.
#pragma once

#include <cuda_bf16.h>

#include "../device/mma_sync.cuh"

namespace slidesparse::mma_sp {

constexpr int kBlockRows = 16;  // channels of a packed block: the M of mma.sp
constexpr int kStepK = 64;      // its K
constexpr int kGroup = 8;       // tokens: its N
constexpr int kValueBytes = kBlockRows * kStepK / 2;
constexpr int kBlockBytes = kValueBytes + kBlockRows * kStepK / 8;  // and 2 bits of metadata for each value
constexpr int kPackedRows = 256;  // packed weights are padded to multiples: every tile lies inside,
constexpr int kPackedSteps = 2;   // and every stage of no more steps
constexpr int kSharedBytes = 99 * 1024;  // what every GPU since sm_80 gives a block; sm_86, 89 and 12x give no more

// Sizes of a tile in elements, how warps divide it, how deep the ring of stages is; from these all the rest, in bytes.
template <int Type_, int Channels_, int Tokens_, int WarpsC_, int WarpsT_, int WarpsK_, int Stages_>
struct Tile {
  static constexpr int Type = Type_, Channels = Channels_, Tokens = Tokens_, Stages = Stages_;
  static constexpr int WarpsC = WarpsC_, WarpsT = WarpsT_, WarpsK = WarpsK_;  // along channels, tokens, K
  static constexpr int kStageK = WarpsK * kStepK;                             // a step for each warp along K
  using Sum = typename SumOf<Type>::Sum;
  static constexpr int kPlaces = WarpsC * WarpsT, kThreads = 32 * kPlaces * WarpsK;
  // Of a warp: channels and blocks of 16 of them, tokens and groups of 8 of them.
  static constexpr int kWarpChannels = Channels / WarpsC, kBlocks = kWarpChannels / kBlockRows;
  static constexpr int kWarpTokens = Tokens / WarpsT, kGroups = kWarpTokens / kGroup;
  // Of a stage: tokens [Tokens][kStageK], then weights [WarpsK][Channels / 16] blocks.
  static constexpr int kTokenBytes = Tokens * kStageK, kStepBytes = Channels / kBlockRows * kBlockBytes;
  static constexpr int kStage = kTokenBytes + WarpsK * kStepBytes;
  // Copies of 16 bytes: of a row of tokens, and rows that all threads copy at once; of a step's weights, of all steps';
  // and how many of each kind a thread has.
  static constexpr int kRowCopies = kStageK / 16, kRowsAtOnce = kThreads / kRowCopies;
  static constexpr int kStepCopies = kStepBytes / 16, kWeightCopies = WarpsK * kStepCopies;
  static constexpr int kOwnRows = Tokens / kRowsAtOnce, kOwnWeights = (kWeightCopies + kThreads - 1) / kThreads;
  // Copies take instructions, during which the tensor cores would idle right after a meeting: they wait until half of
  // the products are under way. Not with so few stages that time presses, nor where copies are all there is to do.
  static constexpr bool kCopiesWait = WarpsK == 1 && Stages > 3;
  // When stages have been read: sums of the other warps along K, and behind them the finished tile.
  static constexpr int kSumsAt = 0, kFinishedAt = (WarpsK - 1) * Channels * Tokens * 4;
  static constexpr int kScalesAt = Stages * kStage;  // of tokens float, of channels scale and bias
  static constexpr int kShared = kScalesAt + Tokens * 4 + Channels * 8;

  static_assert(Channels % (WarpsC * kBlockRows) == 0 && Tokens % (WarpsT * kGroup) == 0, "warps have equal parts");
  static_assert(kPackedRows % Channels == 0);
  static_assert(kStageK == 64 || kStageK % 128 == 0, "the swizzle knows no other rows");
  static_assert(kThreads % kRowCopies == 0 && kRowsAtOnce % 8 == 0 && Tokens % kRowsAtOnce == 0,
                "a thread's copies have one place in the swizzle");
  static_assert(Stages >= 3 && kFinishedAt + Channels * Tokens * 2 <= kScalesAt && kShared <= kSharedBytes);
};

// By value to the kernel.
struct Params {
  const uint8_t* x;       // [m][k]
  const uint8_t* packed;  // [steps][row_blocks] blocks
  const float* token_scale;
  const float* channel_scale;
  const __nv_bfloat16* bias;
  __nv_bfloat16* out;
  int m, n, k, steps, row_blocks;
  int channel_tiles, token_tiles, group;
};

// First channel and token of this block's tile. `group` tiles of tokens are taken together with all channels before the
// next, so that their tokens and the weights stay in the L2 cache.
struct Place {
  int channel, token;
};
template <class T>
__device__ Place place_of(const Params& p) {
  const int index = blockIdx.x, of_group = p.channel_tiles * p.group;
  const int group = index / of_group, rest = index - group * of_group;
  const int width = min(p.group, p.token_tiles - group * p.group);
  return {rest / width * T::Channels, (group * p.group + rest % width) * T::Tokens};
}

// What a warp has of the tile.
template <class T>
struct Warp {
  int lane, place, k, channel, token;

  __device__ Warp() {
    const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);  // the compiler sees that all lanes agree
    lane = threadIdx.x % 32;
    place = warp % T::kPlaces;
    k = warp / T::kPlaces;
    channel = place % T::WarpsC * T::kWarpChannels;
    token = place / T::WarpsC * T::kWarpTokens;
  }
};

// Where 16-byte chunk `chunk` of token `row` lies in a stage: 8 rows at the same chunk, as ldmatrix reads them, and all
// chunks of a row, as copies write them, are in different banks.
template <class T>
__device__ int token_place(int row, int chunk) {
  const int turn = T::kStageK == 64 ? row >> 1 & 3 : row & 7;
  return row * T::kStageK + ((chunk ^ turn) << 4);
}

// -- copies -----------------------------------------------------------------------------------------------------------

// This thread's share of every stage, in their order.
template <class T>
struct Loader {
  const Params& p;
  const uint8_t *tokens[T::kOwnRows], *weights[T::kOwnWeights];  // what comes next, if it is there
  size_t weight_bytes;                                           // from stage to stage
  int k, to;       // of this thread's chunk of a row: the first column that comes next, where the first row's goes
  uint32_t there;  // bit i: row i exists

  __device__ Loader(const Params& p, const Place& at) : p(p), there(0) {
    const int row = threadIdx.x / T::kRowCopies, chunk = threadIdx.x % T::kRowCopies;
    k = chunk * 16;
    to = token_place<T>(row, chunk);
#pragma unroll
    for (int i = 0; i < T::kOwnRows; ++i) {
      const int token = at.token + row + i * T::kRowsAtOnce;
      there |= uint32_t(token < p.m) << i;
      tokens[i] = p.x + size_t(token) * p.k + k;
    }
    const size_t step_bytes = size_t(p.row_blocks) * kBlockBytes;
    weight_bytes = T::WarpsK * step_bytes;
#pragma unroll
    for (int i = 0; i < T::kOwnWeights; ++i) {
      const int copy = weight_copy(i), step = weight_step(i);
      weights[i] = p.packed + at.channel / kBlockRows * size_t(kBlockBytes) + step * step_bytes +
                   (copy - step * T::kStepCopies) * 16;
    }
  }

  __device__ static int weight_copy(int i) { return i * T::kThreads + threadIdx.x; }
  __device__ static int weight_step(int i) { return T::WarpsK == 1 ? 0 : weight_copy(i) / T::kStepCopies; }

  // Tokens beyond m and K beyond k become zeros; steps beyond the packed ones stay as they are: nobody multiplies them.
  __device__ void load(int stage, uint8_t* into) {
#pragma unroll
    for (int i = 0; i < T::kOwnRows; ++i) {
      mma_sync::copy16_or_zeros(into + to + i * T::kRowsAtOnce * T::kStageK, tokens[i], k < p.k && (there >> i & 1));
      tokens[i] += T::kStageK;
    }
    k += T::kStageK;
#pragma unroll
    for (int i = 0; i < T::kOwnWeights; ++i) {
      if ((i + 1 < T::kOwnWeights || weight_copy(i) < T::kWeightCopies) &&
          (T::WarpsK <= kPackedSteps || stage * T::WarpsK + weight_step(i) < p.steps))
        mma_sync::copy16(into + T::kTokenBytes + weight_copy(i) * 16, weights[i]);
      weights[i] += weight_bytes;
    }
  }
};

// Scales and biases of the tile. Without a bias -0 is added, which changes no number, -0 and 0 among them.
template <class T>
__device__ void load_scales(const Params& p, const Place& at, uint8_t* shared) {
  float* tokens = reinterpret_cast<float*>(shared + T::kScalesAt);
  float2* channels = reinterpret_cast<float2*>(shared + T::kScalesAt + T::Tokens * 4);
  for (int i = threadIdx.x; i < T::Tokens; i += T::kThreads)
    tokens[i] = at.token + i < p.m ? p.token_scale[at.token + i] : 0.f;
  for (int i = threadIdx.x; i < T::Channels; i += T::kThreads) {
    const int channel = at.channel + i;
    float2 found = {0.f, -0.f};
    if (channel < p.n) {
      found.x = p.channel_scale[channel];
      if (p.bias) found.y = __bfloat162float(p.bias[channel]);
    }
    channels[i] = found;
  }
}

// -- products ---------------------------------------------------------------------------------------------------------

// What a warp holds of its step of a stage before it multiplies: all weights, and its first 8 tokens.
template <class T>
struct Fragments {
  uint32_t a[T::kBlocks][4], metadata[T::kBlocks], b[4];
};

// Where ldmatrix finds 8 tokens as operand b: lane l names chunk l / 8 of token l % 8, and gets 4 bytes of token l / 4
// of every chunk.
template <class T>
__device__ const uint8_t* tokens_at(const Warp<T>& w, const uint8_t* stage, int group) {
  return stage + token_place<T>(w.token + group * kGroup + w.lane % 8, w.k * (kStepK / 16) + w.lane / 8);
}

template <class T>
__device__ void fetch(const Warp<T>& w, const uint8_t* stage, Fragments<T>& f) {
  mma_sync::load_matrices(f.b, tokens_at(w, stage, 0));
  const uint8_t* weights = stage + T::kTokenBytes + w.k * T::kStepBytes + w.channel / kBlockRows * kBlockBytes;
#pragma unroll
  for (int i = 0; i < T::kBlocks; ++i) {
    const uint8_t* block = weights + i * kBlockBytes;
    const uint4 values = *reinterpret_cast<const uint4*>(block + w.lane * 16);
    f.a[i][0] = values.x, f.a[i][1] = values.y, f.a[i][2] = values.z, f.a[i][3] = values.w;
    f.metadata[i] = *reinterpret_cast<const uint32_t*>(block + kValueBytes + w.lane * 4);
  }
}

// The next 8 tokens are fetched while these are multiplied. `halfway` is done when half of them are.
template <class T, class Halfway>
__device__ void multiply(const Warp<T>& w, const uint8_t* stage, const Fragments<T>& f,
                         typename T::Sum (&d)[T::kBlocks][T::kGroups][4], Halfway&& halfway) {
  uint32_t b[2][4] = {{f.b[0], f.b[1], f.b[2], f.b[3]}};
#pragma unroll
  for (int group = 0; group < T::kGroups; ++group) {
    if (group + 1 < T::kGroups) mma_sync::load_matrices(b[(group + 1) % 2], tokens_at(w, stage, group + 1));
    if (group == T::kGroups / 2) halfway();
#pragma unroll
    for (int i = 0; i < T::kBlocks; ++i)
      mma_sync::Instruction<T::Type, true>::issue(d[i][group], f.a[i], b[group % 2], f.metadata[i]);
  }
}

// All stages through the ring. Fragments are one stage ahead: the tensor cores have work while the block meets. One
// meeting a stage: it says that the copies of all threads have arrived in the next one, and that all have read the one
// before, whose place the next copies take.
template <class T>
__device__ void multiply_tile(const Params& p, const Place& at, const Warp<T>& w, uint8_t* shared,
                              typename T::Sum (&d)[T::kBlocks][T::kGroups][4]) {
  Loader<T> loader(p, at);
  const int stages = (p.steps + T::WarpsK - 1) / T::WarpsK;
#pragma unroll
  for (int stage = 0; stage < T::Stages - 1; ++stage) {
    if (stage < stages) loader.load(stage, shared + stage * T::kStage);
    mma_sync::commit_copies();  // also where there are none: groups are counted
  }
  load_scales<T>(p, at, shared);
  mma_sync::wait_copies<T::Stages - 2>();
  __syncthreads();
  Fragments<T> now, next;
  fetch<T>(w, shared, now);
  int reading = 0, writing = T::Stages - 1;
#pragma unroll 2
  for (int stage = 0; stage < stages; ++stage) {
    const uint8_t* here = shared + reading * T::kStage;
    reading = reading + 1 == T::Stages ? 0 : reading + 1;
    mma_sync::wait_copies<T::Stages - 3>();
    __syncthreads();
    fetch<T>(w, shared + reading * T::kStage, next);  // after the last stage: whatever is there, for nobody
    const auto copy = [&] {
      const int ahead = stage + T::Stages - 1;
      if (ahead < stages) loader.load(ahead, shared + writing * T::kStage);
      mma_sync::commit_copies();
      writing = writing + 1 == T::Stages ? 0 : writing + 1;
    };
    if (!T::kCopiesWait) copy();
    // Of the last stage some steps may not be packed: what their warps have is not theirs to multiply.
    if (T::WarpsK <= kPackedSteps || stage * T::WarpsK + w.k < p.steps)
      multiply<T>(w, here, now, d, [&] {
        if (T::kCopiesWait) copy();
      });
    now = next;
  }
  __syncthreads();  // the stages are free
}

// -- epilogue ---------------------------------------------------------------------------------------------------------

template <class Sum>
struct alignas(16) Four {
  Sum v[4];
};

// The first warp along K gets the sums of all; false in the others, which are done.
template <class T>
__device__ bool add_up(const Warp<T>& w, uint8_t* shared, typename T::Sum (&d)[T::kBlocks][T::kGroups][4]) {
  const auto sums = [&](int k, int i, int group) {
    const int index = (((k - 1) * T::kPlaces + w.place) * T::kBlocks + i) * T::kGroups + group;
    return reinterpret_cast<Four<typename T::Sum>*>(shared + T::kSumsAt) + index * 32 + w.lane;
  };
  if (w.k > 0) {
#pragma unroll
    for (int i = 0; i < T::kBlocks; ++i)
#pragma unroll
      for (int group = 0; group < T::kGroups; ++group)
        *sums(w.k, i, group) = {{d[i][group][0], d[i][group][1], d[i][group][2], d[i][group][3]}};
  }
  __syncthreads();
  if (w.k > 0) return false;
#pragma unroll
  for (int i = 0; i < T::kBlocks; ++i)
#pragma unroll
    for (int group = 0; group < T::kGroups; ++group)
#pragma unroll
      for (int k = 1; k < T::WarpsK; ++k) {
        const Four<typename T::Sum> part = *sums(k, i, group);
#pragma unroll
        for (int j = 0; j < 4; ++j) d[i][group][j] += part.v[j];
      }
  return true;
}

// The reference's order, each step rounded: (acc * token scale) * channel scale + bias.
template <class Sum>
__device__ float finished(Sum sum, float token_scale, float2 channel) {
  return __fadd_rn(__fmul_rn(__fmul_rn(float(sum), token_scale), channel.x), channel.y);
}
__device__ inline uint32_t two_bf16(float first, float second) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&two);
}

// Where 8 channels `chunk` of token `row` lie in a warp's finished tile: spread over the banks for the 4-byte stores
// below (8 rows, one chunk) and for the 16-byte loads (neighbouring chunks).
template <class T>
__device__ int finished_place(int row, int chunk) {
  constexpr int kChunks = T::kWarpChannels / 8, kRowsOfBanks = kChunks < 8 ? 8 / kChunks : 1;
  return (row * kChunks + (chunk ^ row / kRowsOfBanks % kChunks)) * 16;
}

// A lane holds sums of channels lane / 4 and 8 more of each block, of tokens 2 * (lane % 4) and one more of each group:
// a quad has a channel, but of out it is to write a token.
template <class T>
__device__ void write_tile(const Params& p, const Place& at, const Warp<T>& w, uint8_t* shared,
                           typename T::Sum (&d)[T::kBlocks][T::kGroups][4]) {
  const float* token_scales = reinterpret_cast<const float*>(shared + T::kScalesAt) + w.token;
  const float2* channels = reinterpret_cast<const float2*>(shared + T::kScalesAt + T::Tokens * 4) + w.channel;
  uint8_t* tile = shared + T::kFinishedAt + w.place * (T::kWarpTokens * T::kWarpChannels * 2);
  const int quad = w.lane / 4, two = w.lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < T::kBlocks; ++i) {
    const float2 low = channels[i * kBlockRows + quad], high = channels[i * kBlockRows + quad + 8];
#pragma unroll
    for (int group = 0; group < T::kGroups; ++group) {
      const float2 scale = *reinterpret_cast<const float2*>(token_scales + group * kGroup + two);
      const typename T::Sum(&sums)[4] = d[i][group];
      const uint32_t first = two_bf16(finished(sums[0], scale.x, low), finished(sums[1], scale.y, low));
      const uint32_t second = two_bf16(finished(sums[2], scale.x, high), finished(sums[3], scale.y, high));
      uint8_t* to = tile + two * 2;
      const int token = group * kGroup + quad;
      *reinterpret_cast<uint32_t*>(to + finished_place<T>(token, 2 * i)) = mma_sync::transposed(first);
      *reinterpret_cast<uint32_t*>(to + finished_place<T>(token, 2 * i + 1)) = mma_sync::transposed(second);
    }
  }
  __syncwarp();
  constexpr int kChunks = T::kWarpChannels / 8, kRowsAtOnce = 32 / kChunks;
  const int chunk = w.lane % kChunks, channel = at.channel + w.channel + chunk * 8;
#pragma unroll
  for (int first = 0; first < T::kWarpTokens; first += kRowsAtOnce) {
    const int row = first + w.lane / kChunks, token = at.token + w.token + row;
    if (row < T::kWarpTokens && token < p.m && channel < p.n)
      *reinterpret_cast<uint4*>(p.out + size_t(token) * p.n + channel) =
          *reinterpret_cast<const uint4*>(tile + finished_place<T>(row, chunk));
  }
}

// -- kernel -----------------------------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(T::kThreads) sparse_gemm(const Params p) {
  if constexpr (mma_sync::exists<T::Type>()) {
    extern __shared__ __align__(128) uint8_t shared[];
    const Place at = place_of<T>(p);
    const Warp<T> w;
    typename T::Sum d[T::kBlocks][T::kGroups][4] = {};
    multiply_tile<T>(p, at, w, shared, d);
    if constexpr (T::WarpsK > 1) {
      if (!add_up<T>(w, shared, d)) return;
    }
    write_tile<T>(p, at, w, shared, d);
  } else {
    __trap();
  }
}

}  // namespace slidesparse::mma_sp
