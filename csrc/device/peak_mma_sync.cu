// sm_80 and later: rate of mma.sync and mma.sp.sync with operands in registers.
//
// A warp holds 4 fragments of a (16 rows each) and 4 of b (8 columns each) and issues their 16 products again and
// again: as many independent accumulators as hide the instruction's latency. Fragments are 32 bytes of K whatever the
// type (PTX ISA, "Matrix Fragments for mma.m16n8k32"), twice as many of b where a is sparse.
// Loads. Four more warps keep two pieces under way.
#include "mma_sync.cuh"

namespace slidesparse {

namespace {

constexpr int kTilesOfA = 4, kTilesOfB = 4;
constexpr int kRows = 16 * kTilesOfA, kCols = 8 * kTilesOfB;
constexpr int kBytesOfA = 32;  // of one row
constexpr int kMaxUnits = 12;
constexpr int kLoaders = 128;  // threads
constexpr int kCopies = 8;     // of 16 bytes, of each of them, in one piece
constexpr int kPiece = kLoaders * kCopies * 16;
constexpr int kThreads = kMaxUnits * 32 + kLoaders;
constexpr int kSharedBytes = 2 * kPiece;

__device__ uint32_t word(const uint8_t* bytes) { return *reinterpret_cast<const uint32_t*>(bytes); }

__device__ void load_all_the_while(const Launch& launch, uint8_t* pieces, const int* finished) {
  const int thread = threadIdx.x - launch.units * 32;
  Walk walk(launch.source_bytes, kPiece);
  unsigned long long rounds = 0;
  for (; running(finished, launch.units); ++rounds) {
    const uint8_t* from = launch.source + walk.next(kPiece);
    uint8_t* to = pieces + (rounds & 1) * kPiece;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int place = (i * kLoaders + thread) * 16;
      mma_sync::copy16(to + place, from + place);
    }
    mma_sync::commit_copies();
    mma_sync::wait_copies<1>();
  }
  mma_sync::wait_copies<0>();
  atomicAdd(launch.loaded, rounds * (kPiece / kLoaders));
}

template <int Type, bool Sparse>
__device__ void multiply(const Launch& launch) {
  using Sum = typename SumOf<Type>::Sum;
  constexpr int kWordsOfB = Sparse ? 4 : 2;
  const int unit = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = lane / 4, byte = lane % 4 * 4;
  uint32_t a[kTilesOfA][4], b[kTilesOfB][kWordsOfB], metadata[kTilesOfA] = {};
#pragma unroll
  for (int i = 0; i < kTilesOfA; ++i) {
    const uint8_t* tile = launch.a + (unit * kRows + i * 16) * kBytesOfA;
#pragma unroll
    for (int j = 0; j < 4; ++j) a[i][j] = word(tile + (group + j % 2 * 8) * kBytesOfA + byte + j / 2 * 16);
    if constexpr (Sparse) metadata[i] = launch.metadata[(unit * kTilesOfA + i) * 32 + lane];
  }
#pragma unroll
  for (int i = 0; i < kTilesOfB; ++i)
#pragma unroll
    for (int j = 0; j < kWordsOfB; ++j) b[i][j] = word(launch.b + (i * 8 + group) * kWordsOfB * 16 + byte + j * 16);

  Sum d[kTilesOfA][kTilesOfB][4];
#pragma unroll
  for (int i = 0; i < kTilesOfA * kTilesOfB * 4; ++i) d[i / 16][i / 4 % 4][i % 4] = 0;
#pragma unroll 1
  for (int i = 0; i < launch.iterations; ++i)
#pragma unroll
    for (int m = 0; m < kTilesOfA; ++m)
#pragma unroll
      for (int n = 0; n < kTilesOfB; ++n)
        mma_sync::Instruction<Type, Sparse>::issue(d[m][n], a[m], b[n], metadata[m]);

  if (launch.out == nullptr || blockIdx.x != 0) return;
  Sum* out = static_cast<Sum*>(launch.out) + unit * kRows * kCols;
#pragma unroll
  for (int m = 0; m < kTilesOfA; ++m)
#pragma unroll
    for (int n = 0; n < kTilesOfB; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        out[(m * 16 + group + i / 2 * 8) * kCols + n * 8 + lane % 4 * 2 + i % 2] = d[m][n][i];
}

template <int Type, bool Sparse>
__global__ void __launch_bounds__(kThreads, 1) mma_sync_rate(Launch launch) {
  if constexpr (mma_sync::exists<Type>()) {
    extern __shared__ __align__(16) uint8_t pieces[];
    __shared__ int finished;
    if (threadIdx.x == 0) finished = 0;
    __syncthreads();
    if (threadIdx.x < launch.units * 32) {
      multiply<Type, Sparse>(launch);
      if (threadIdx.x % 32 == 0) atomicAdd(&finished, 1);
    } else if (launch.source != nullptr) {
      load_all_the_while(launch, pieces, &finished);
    }
  } else {
    __trap();
  }
}

template <int Type>
void start_type(const ss_peak_form& form, const Launch& launch, int blocks, void* stream) {
  const auto kernel = form.sparse ? mma_sync_rate<Type, true> : mma_sync_rate<Type, false>;
  start(kernel, form, launch, blocks, form.units * 32 + kLoaders, kSharedBytes, stream);
}

}  // namespace

void start_mma_sync(const ss_peak_form& form, const Launch& launch, int blocks, void* stream) {
  if (form.units < 1 || form.units > kMaxUnits || form.rows != kRows || form.cols != kCols || form.stages != 1)
    throw Error("mma.sync: not a form of this library: " + std::string(form.instruction));
  switch (form.type) {
    case SS_INT8: return start_type<SS_INT8>(form, launch, blocks, stream);
    case SS_FP8_E4M3: return start_type<SS_FP8_E4M3>(form, launch, blocks, stream);
    case SS_BF16: return start_type<SS_BF16>(form, launch, blocks, stream);
    case SS_FP16: return start_type<SS_FP16>(form, launch, blocks, stream);
  }
  throw Error(std::string("mma.sync: no kernel of ") + type_name(form.type));
}

}  // namespace slidesparse
