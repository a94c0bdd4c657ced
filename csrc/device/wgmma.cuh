// sm_90a: the warpgroup's matrix instruction on operands in shared memory.
#pragma once

#include "hopper.cuh"
#include "rate.cuh"

namespace slidesparse::wgmma {

#ifdef SS_HAS_WGMMA

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
