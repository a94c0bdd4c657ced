// sm_90a: the warpgroup's matrix instruction on operands in shared memory, and the copy engine's barrier.
#pragma once

#include <cstdint>

#include "rate.cuh"

// wgmma exists in code for sm_90a alone; for other architectures the kernel is empty and never started.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SS_HAS_WGMMA 1
#endif

namespace slidesparse::wgmma {

// Byte address inside the block's shared memory: what PTX operands want instead of a generic pointer.
__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Swizzle modes of a matrix descriptor: rows of 128 or 64 bytes, their 16-byte chunks permuted against bank conflicts.
enum Swizzle : uint32_t { kRows128 = 1, kRows64 = 2 };

// Descriptor of a K-major tile (PTX ISA, "Matrix Descriptor Format"): start, distance of 8-row blocks, swizzle mode.
__device__ inline uint64_t descriptor(uint32_t address, Swizzle swizzle) {
  const uint64_t eight_rows = swizzle == kRows128 ? 1024 : 512;
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t(1) << 16 | (eight_rows >> 4) << 32 | uint64_t(swizzle) << 62;
}

// Where 16-byte chunk `chunk` of row `row` lies in a swizzled tile that starts at a multiple of 1024 bytes.
template <Swizzle Mode>
__device__ inline uint32_t swizzled(uint32_t row, uint32_t chunk) {
  if (Mode == kRows128) return row * 128 + ((chunk ^ (row & 7)) << 4);
  return row * 64 + ((chunk ^ (row >> 1 & 3)) << 4);
}

#ifdef SS_HAS_WGMMA

// Before the first wgmma, and again after registers of its accumulator were touched by other instructions.
__device__ inline void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Closes a group of wgmmas, which is what can be waited for.
__device__ inline void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most `Pending` groups are under way: one stays, so that the tensor cores never run dry.
template <int Pending>
__device__ inline void wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// Shared memory written by ordinary stores becomes visible to wgmma, which reads by another path (the async proxy).
__device__ inline void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A barrier that one arrival and the bytes it announces complete.
__device__ inline void barrier_init(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
__device__ inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done = 0;
  while (!done) {  // try_wait gives up after a while
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}
// The copy engine takes one whole piece; its bytes count towards the barrier.
__device__ inline void bulk_load(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// -- the instruction --------------------------------------------------------------------------------------------------
// wgmma names each accumulator register, N / 2 of them, in its text, and the compiler wants each as an operand. PTX has
// no loop for that, hence these lists: texts "%0, %1, ..." and operands d[0], d[1], ....
#define SS_TEXT5(tens, a, b, c, d, e) "%" tens #a ", %" tens #b ", %" tens #c ", %" tens #d ", %" tens #e
#define SS_TEXT10(tens) SS_TEXT5(tens, 0, 1, 2, 3, 4) ", " SS_TEXT5(tens, 5, 6, 7, 8, 9)
#define SS_TEXT30(first, second, third) SS_TEXT10(first) ", " SS_TEXT10(second) ", " SS_TEXT10(third)
#define SS_TEXT60 SS_TEXT30("", "1", "2") ", " SS_TEXT30("3", "4", "5")
#define SS_TEXT120 SS_TEXT60 ", " SS_TEXT30("6", "7", "8") ", " SS_TEXT30("9", "10", "11")
#define SS_TEXT_128 "{" SS_TEXT60 ", %60, %61, %62, %63}"
#define SS_TEXT_256 "{" SS_TEXT120 ", %120, %121, %122, " SS_TEXT5("12", 3, 4, 5, 6, 7) "}"

#define SS_OPERANDS4(c, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3])
#define SS_OPERANDS16(c, i) SS_OPERANDS4(c, i), SS_OPERANDS4(c, i + 4), SS_OPERANDS4(c, i + 8), SS_OPERANDS4(c, i + 12)
#define SS_OPERANDS32(c, i) SS_OPERANDS16(c, i), SS_OPERANDS16(c, i + 16)
#define SS_OPERANDS_128(c) SS_OPERANDS32(c, 0), SS_OPERANDS32(c, 32)
#define SS_OPERANDS_256(c) SS_OPERANDS_128(c), SS_OPERANDS32(c, 64), SS_OPERANDS32(c, 96)

// Numbers of the operands that follow the accumulator: descriptors of a and b, metadata.
#define SS_NEXT_128 "%64, %65"
#define SS_NEXT_256 "%128, %129"
#define SS_METADATA_128 "%66"
#define SS_METADATA_256 "%130"

// d += a * b^T for one step along K: 32 bytes of a (for sparse a: of kept values).
template <int Type, bool Sparse, int N>
struct Instruction;

// Of the operands after the descriptors: "0" selects the threads of a quad that hold the metadata, the first "1" adds
// to d instead of overwriting it, the next two take a and b with their own sign, "0, 0": neither is transposed.
#define SS_WGMMA(TYPE, N, C, K, SPARSE_K, TYPES, TAIL)                                                             \
  template <>                                                                                                      \
  struct Instruction<TYPE, false, N> {                                                                             \
    static __device__ void issue(SumOf<TYPE>::Sum (&d)[N / 2], uint64_t a, uint64_t b, uint32_t) {                 \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #N K TYPES " " SS_TEXT_##N ", " SS_NEXT_##N ", 1" TAIL ";"  \
                   : SS_OPERANDS_##N(C)                                                                            \
                   : "l"(a), "l"(b));                                                                              \
    }                                                                                                              \
  };                                                                                                               \
  template <>                                                                                                      \
  struct Instruction<TYPE, true, N> {                                                                              \
    static __device__ void issue(SumOf<TYPE>::Sum (&d)[N / 2], uint64_t a, uint64_t b, uint32_t metadata) {        \
      asm volatile("wgmma.mma_async.sp.sync.aligned.m64n" #N SPARSE_K TYPES " " SS_TEXT_##N ", " SS_NEXT_##N       \
                   ", " SS_METADATA_##N ", 0, 1" TAIL ";"                                                          \
                   : SS_OPERANDS_##N(C)                                                                            \
                   : "l"(a), "l"(b), "r"(metadata));                                                               \
    }                                                                                                              \
  };
#define SS_WGMMA_BOTH(...) SS_WGMMA_N(128, __VA_ARGS__) SS_WGMMA_N(256, __VA_ARGS__)
#define SS_WGMMA_N(N, TYPE, ...) SS_WGMMA(TYPE, N, __VA_ARGS__)

SS_WGMMA_BOTH(SS_INT8, "+r", "k32", "k64", ".s32.s8.s8", "")
SS_WGMMA_BOTH(SS_FP8_E4M3, "+f", "k32", "k64", ".f32.e4m3.e4m3", ", 1, 1")
SS_WGMMA_BOTH(SS_BF16, "+f", "k16", "k32", ".f32.bf16.bf16", ", 1, 1, 0, 0")
SS_WGMMA_BOTH(SS_FP16, "+f", "k16", "k32", ".f32.f16.f16", ", 1, 1, 0, 0")

#endif  // SS_HAS_WGMMA

}  // namespace slidesparse::wgmma
