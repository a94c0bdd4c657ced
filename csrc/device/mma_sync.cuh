// sm_80 and later: the warp's matrix instruction on operands in registers, and asynchronous copies without barriers.
#pragma once

#include <cstdint>

#include "rate.cuh"

namespace slidesparse::mma_sync {

// FP8 came with sm_89; in older code its kernel is empty and never started.
template <int Type>
__device__ constexpr bool exists() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  return true;
#else
  return Type != SS_FP8_E4M3;
#endif
}

// 16 bytes from global into shared memory; `cg` goes past the multiprocessor's own cache.
__device__ inline void copy16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from)
               : "memory");
}
// Likewise, or 16 zeros, and then nothing is read.
__device__ inline void copy16_or_zeros(void* to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(there ? 16 : 0)
               : "memory");
}
// Closes a group of this thread's copies, which is what can be waited for.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Four 8x8 matrices of 16-bit values (rows of 16 bytes): lane l names row l % 8 of matrix l / 8 in shared memory, and
// gets 4 bytes at l % 4 * 4 of row l / 4 of each. One instruction instead of four loads with bank conflicts.
__device__ inline void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}
// An 8x8 matrix of 16-bit values, 2 of row l / 4 in lane l, becomes its transpose without a way through memory.
__device__ inline uint32_t transposed(uint32_t two) {
  uint32_t other;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(other) : "r"(two));
  return other;
}

// d [16 x 8] += a * b^T for one step along K: 32 bytes of a (for sparse a: of kept values). A thread has 4 registers of
// a, 2 of b (sparse: 4). Sparse: index pairs ascend ("ordered", which every GPU since sm_80 takes at full rate), and 0
// selects the threads of a quad that hold the metadata.
template <int Type, bool Sparse>
struct Instruction;

#define SS_MMA_SYNC_ASM(TYPE, C, K, SPARSE_K, TYPES)                                                                  \
  template <>                                                                                                         \
  struct Instruction<TYPE, false> {                                                                                   \
    static __device__ void issue(SumOf<TYPE>::Sum (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],            \
                                 uint32_t) {                                                                          \
      asm volatile("mma.sync.aligned.m16n8" K ".row.col" TYPES " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "      \
                   "{%0, %1, %2, %3};"                                                                                \
                   : C(d[0]), C(d[1]), C(d[2]), C(d[3])                                                               \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                               \
    }                                                                                                                 \
  };                                                                                                                  \
  template <>                                                                                                         \
  struct Instruction<TYPE, true> {                                                                                    \
    static __device__ void issue(SumOf<TYPE>::Sum (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],            \
                                 uint32_t metadata) {                                                                 \
      asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8" SPARSE_K ".row.col" TYPES                            \
                   " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0x0;"             \
                   : C(d[0]), C(d[1]), C(d[2]), C(d[3])                                                               \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),          \
                     "r"(metadata));                                                                                  \
    }                                                                                                                 \
  };

SS_MMA_SYNC_ASM(SS_INT8, "+r", "k32", "k64", ".s32.s8.s8.s32")
SS_MMA_SYNC_ASM(SS_FP8_E4M3, "+f", "k32", "k64", ".f32.e4m3.e4m3.f32")
SS_MMA_SYNC_ASM(SS_BF16, "+f", "k16", "k32", ".f32.bf16.bf16.f32")
SS_MMA_SYNC_ASM(SS_FP16, "+f", "k16", "k32", ".f32.f16.f16.f32")

}  // namespace slidesparse::mma_sync
