// sm_90a: rate of wgmma and wgmma.sp with both operands in shared memory.
//
// Layout. One stage is 128 bytes of K: b as [cols][128] bytes, a as [64][128] bytes a warpgroup, or [64][64] kept bytes
// where it is sparse, both swizzled as the copy engine would lay them. An iteration issues the 4 (sparse: 2) wgmmas of
// a stage and waits for those of the iteration before, so one group is always under way.
// Loads. One thread keeps two pieces under way, as a GEMM's producer does.
#include "wgmma.cuh"

namespace slidesparse {

namespace {

constexpr int kStages = 3;
constexpr int kMaxUnits = 2;
constexpr int kWarpgroup = 128;
constexpr int kRows = 64;
constexpr int kStageBytesOfK = 128;
constexpr int kPiece = 24576;  // bytes of one load; two are under way
constexpr int kThreads = kMaxUnits * kWarpgroup + 32;

template <bool Sparse>
struct Shape {
  static constexpr int kBytesOfA = Sparse ? kStageBytesOfK / 2 : kStageBytesOfK;
  static constexpr int kTileOfA = kRows * kBytesOfA;

  static constexpr __host__ __device__ int operand_bytes(int cols, int units) {
    return kStages * (cols * kStageBytesOfK + units * kTileOfA);
  }
  // Operands, two pieces, their two barriers, the counter of finished units.
  static constexpr int shared_bytes(int cols, int units) { return operand_bytes(cols, units) + 2 * kPiece + 32; }
};

#ifdef SS_HAS_WGMMA

constexpr int kPieceOrder = 8192;  // bytes of one order to the copy engine
template <bool Sparse>
constexpr int kSteps = Shape<Sparse>::kBytesOfA / 32;  // wgmmas of a stage
template <bool Sparse>
constexpr wgmma::Swizzle kSwizzleOfA = Sparse ? wgmma::kRows64 : wgmma::kRows128;

// Rows of 128 or 64 bytes, all tiles one after the other, into their swizzled places.
template <wgmma::Swizzle Mode>
__device__ void lay(uint8_t* to, const uint8_t* from, int rows) {
  constexpr int kChunks = Mode == wgmma::kRows128 ? 8 : 4;
  for (int i = threadIdx.x; i < rows * kChunks; i += blockDim.x)
    *reinterpret_cast<uint4*>(to + wgmma::swizzled<Mode>(i / kChunks, i % kChunks)) =
        reinterpret_cast<const uint4*>(from)[i];
}

__device__ void load_all_the_while(const Launch& launch, uint32_t pieces, uint32_t barriers, const int* finished) {
  Walk walk(launch.source_bytes, kPiece);
  unsigned long long rounds = 0;
  for (int slot = 0; rounds < 2 || running(finished, launch.units); slot ^= 1, ++rounds) {
    if (rounds >= 2) wgmma::barrier_wait(barriers + slot * 8, (rounds / 2 - 1) & 1);  // this slot's load before
    const uint8_t* from = launch.source + walk.next(kPiece);
    wgmma::barrier_expect(barriers + slot * 8, kPiece);
    for (int done = 0; done < kPiece; done += kPieceOrder)
      wgmma::bulk_load(pieces + slot * kPiece + done, from + done, kPieceOrder, barriers + slot * 8);
  }
  for (unsigned long long last = rounds - 2; last < rounds; ++last)  // nothing may arrive after the block has ended
    wgmma::barrier_wait(barriers + (last & 1) * 8, (last / 2) & 1);
  atomicAdd(launch.loaded, rounds * kPiece);
}

template <int Type, bool Sparse, int N>
__device__ void multiply(const Launch& launch, const uint8_t* a, const uint8_t* b) {
  using S = Shape<Sparse>;
  using Sum = typename SumOf<Type>::Sum;
  const int unit = threadIdx.x / kWarpgroup, lane = threadIdx.x % kWarpgroup;
  uint32_t metadata[kSteps<Sparse>] = {};
  if constexpr (Sparse) {
#pragma unroll
    for (int k = 0; k < kSteps<Sparse>; ++k)
      metadata[k] = launch.metadata[(k * launch.units + unit) * kWarpgroup + lane];
  }
  Sum d[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) d[i] = 0;
#pragma unroll 1
  for (int i = 0; i < launch.iterations; ++i) {
    const int stage = i % kStages;
    const uint64_t of_b = wgmma::descriptor(wgmma::shared_address(b + stage * N * kStageBytesOfK), wgmma::kRows128);
    const uint8_t* tile = a + (stage * launch.units + unit) * S::kTileOfA;
    const uint64_t of_a = wgmma::descriptor(wgmma::shared_address(tile), kSwizzleOfA<Sparse>);
    wgmma::fence();
#pragma unroll
    for (int k = 0; k < kSteps<Sparse>; ++k)  // descriptors count in 16 bytes: 32 of a, as many or twice as many of b
      wgmma::Instruction<Type, Sparse, N>::issue(d, of_a + 2 * k, of_b + (Sparse ? 4 : 2) * k, metadata[k]);
    wgmma::commit();
    wgmma::wait<1>();
  }
  wgmma::wait<0>();
  if (launch.out == nullptr || blockIdx.x != 0) return;
  // PTX ISA, "wgmma accumulator layout": a warp has 16 rows, a thread pairs of columns of two of them.
  const int row = lane / 32 * 16 + lane % 32 / 4, column = lane % 4 * 2;
  Sum* out = static_cast<Sum*>(launch.out) + unit * kRows * N;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) out[(row + (i & 2) * 4) * N + column + i / 4 * 8 + (i & 1)] = d[i];
}

#endif  // SS_HAS_WGMMA

template <int Type, bool Sparse, int N>
__global__ void __launch_bounds__(kThreads, 1) wgmma_rate(Launch launch) {
#ifdef SS_HAS_WGMMA
  using S = Shape<Sparse>;
  extern __shared__ __align__(1024) uint8_t shared[];
  if (wgmma::shared_address(shared) % 1024 != 0) __trap();  // the swizzle pattern counts from multiples of 1024
  uint8_t* b = shared;
  uint8_t* a = b + kStages * N * kStageBytesOfK;
  uint8_t* pieces = shared + S::operand_bytes(N, launch.units);
  const uint32_t barriers = wgmma::shared_address(pieces + 2 * kPiece);
  auto* finished = reinterpret_cast<int*>(pieces + 2 * kPiece + 2 * 8);
  lay<wgmma::kRows128>(b, launch.b, kStages * N);
  lay<kSwizzleOfA<Sparse>>(a, launch.a, kStages * launch.units * kRows);
  if (threadIdx.x == 0) {
    *finished = 0;
    wgmma::barrier_init(barriers, 1);
    wgmma::barrier_init(barriers + 8, 1);
    wgmma::barriers_ready();
  }
  wgmma::publish();
  __syncthreads();
  if (threadIdx.x < launch.units * kWarpgroup) {
    multiply<Type, Sparse, N>(launch, a, b);
    if (threadIdx.x % kWarpgroup == 0) atomicAdd(finished, 1);
  } else if (launch.source != nullptr && threadIdx.x == launch.units * kWarpgroup) {
    load_all_the_while(launch, wgmma::shared_address(pieces), barriers, finished);
  }
#else
  __trap();
#endif
}

template <int Type, bool Sparse, int N>
void start_shape(const ss_peak_form& form, const Launch& launch, int blocks, void* stream) {
  const int threads = form.units * kWarpgroup + 32;
  start(wgmma_rate<Type, Sparse, N>, form, launch, blocks, threads, Shape<Sparse>::shared_bytes(N, form.units), stream);
}

template <int Type>
void start_type(const ss_peak_form& form, const Launch& launch, int blocks, void* stream) {
  if (form.sparse && form.cols == 256) return start_shape<Type, true, 256>(form, launch, blocks, stream);
  if (form.sparse && form.cols == 128) return start_shape<Type, true, 128>(form, launch, blocks, stream);
  if (form.cols == 256) return start_shape<Type, false, 256>(form, launch, blocks, stream);
  if (form.cols == 128) return start_shape<Type, false, 128>(form, launch, blocks, stream);
  throw Error("wgmma: no kernel of N=" + std::to_string(form.cols));
}

}  // namespace

void start_wgmma(const ss_peak_form& form, const Launch& launch, int blocks, void* stream) {
  if (form.units < 1 || form.units > kMaxUnits || form.rows != kRows || form.stages != kStages)
    throw Error("wgmma: not a form of this library: " + std::string(form.instruction));
  switch (form.type) {
    case SS_INT8: return start_type<SS_INT8>(form, launch, blocks, stream);
    case SS_FP8_E4M3: return start_type<SS_FP8_E4M3>(form, launch, blocks, stream);
    case SS_BF16: return start_type<SS_BF16>(form, launch, blocks, stream);
    case SS_FP16: return start_type<SS_FP16>(form, launch, blocks, stream);
  }
  throw Error(std::string("wgmma: no kernel of ") + type_name(form.type));
}

}  // namespace slidesparse
