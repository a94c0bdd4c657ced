// sm_90a: the sparse matrix instruction for 8-bit operands at every width the GEMM uses, and what blocks of a cluster
// say to each other.
#pragma once

#include "../device/hopper.cuh"
#include "slidesparse_gemm.h"

namespace slidesparse::wgmma {

#ifdef SS_HAS_WGMMA

template <int Registers>
__device__ inline void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ inline void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

// -- clusters ---------------------------------------------------------------------------------------------------------

__device__ inline uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// All threads of all blocks of the cluster meet; what they wrote to shared memory before is visible after.
__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The same place in the shared memory of another block of the cluster.
__device__ inline uint32_t peer_address(uint32_t address, uint32_t rank) {
  uint32_t peer;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(peer) : "r"(address), "r"(rank));
  return peer;
}
__device__ inline void peer_load4(int* v, uint32_t address) {
  asm volatile("ld.shared::cluster.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(address)
               : "memory");
}
__device__ inline void peer_load4(float* v, uint32_t address) {
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
               : "r"(address)
               : "memory");
}
// To this block's own. Floats as floats: a cast of wgmma's accumulators reads them too early, in the compiler's eyes.
__device__ inline void store4(uint32_t address, const int* v) {
  asm volatile("st.shared.v4.s32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
}
__device__ inline void store4(uint32_t address, const float* v) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3])
               : "memory");
}

// -- the copy engine --------------------------------------------------------------------------------------------------

// Bytes to the same place of every block in `mask` (bit r: rank r), counted by the barrier at the same place there.
__device__ inline void bulk_load_to(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, uint16_t mask) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;"
      ::"r"(to), "l"(from), "r"(bytes), "r"(barrier), "h"(mask)
      : "memory");
}
// A box of a two-dimensional tensor, as the map says how large and how swizzled; beyond the tensor there are zeros.
__device__ inline void box_load(uint32_t to, const void* map, int column, int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          to),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}
__device__ inline void box_load_to(uint32_t to, const void* map, int column, int row, uint32_t barrier, uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(mask)
      : "memory");
}
// A box from shared memory; what lies beyond the tensor is not written. A thread's stores are one group each.
__device__ inline void box_store(const void* map, int column, int row, uint32_t from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(column),
               "r"(row), "r"(from)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Until all but the last `Pending` stores of this thread have read their shared memory. A block may end then: what they
// write is there when the grid has ended, as with any other store.
template <int Pending>
__device__ inline void stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}
// The copy engine fetches maps through a cache of its own: ask for it before it is needed.
__device__ inline void prefetch_map(const void* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// -- ordinary copies, registers ---------------------------------------------------------------------------------------

// 4 bytes from global to shared memory without a register; zeros where `there` is false.
__device__ inline void copy4(uint32_t to, const void* from, bool there) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(there ? 4 : 0) : "memory");
}
__device__ inline void copies_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// The threads of one warpgroup meet (barriers 1, 2, ...: 0 is __syncthreads).
__device__ inline void warpgroup_sync(int barrier) { asm volatile("bar.sync %0, 128;" ::"r"(barrier) : "memory"); }
// All threads of the block.
__device__ inline void block_sync() { __syncthreads(); }
// Those of two warpgroups.
__device__ inline void warpgroups_sync(int barrier) { asm volatile("bar.sync %0, 256;" ::"r"(barrier) : "memory"); }
// From this block's shared memory, by its address.
__device__ inline void shared_load(uint16_t& v, uint32_t address) {
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address) : "memory");
}
__device__ inline void shared_load(float& v, uint32_t address) {
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
}
__device__ inline void shared_load(float2& v, uint32_t address) {
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
}
__device__ inline void shared_load(uint2& v, uint32_t address) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
}
// Two 8x8 matrices of 16-bit values, transposed on the way: lanes 0 to 15 name a row of 16 bytes each.
__device__ inline void store_transposed(uint32_t to, uint32_t a, uint32_t b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to), "r"(a), "r"(b) : "memory");
}
// Four of them, all 32 lanes.
__device__ inline void store_transposed(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}
// wgmma works on registers behind the compiler's back: nothing that touches them may move across this.
__device__ inline void pin(int& value) { asm volatile("" : "+r"(value)::"memory"); }
__device__ inline void pin(float& value) { asm volatile("" : "+f"(value)::"memory"); }

// -- the instruction --------------------------------------------------------------------------------------------------
// wgmma names each of its N / 2 accumulators in its text, and the compiler wants each as an operand: PTX has no loop
// for that, hence these lists of 16.
#define SS_N0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define SS_N1 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SS_N2 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define SS_N3 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SS_N4 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define SS_N5 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define SS_N6 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define SS_N7 "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define SS_NAMES_32 SS_N0
#define SS_NAMES_64 SS_NAMES_32 ", " SS_N1
#define SS_NAMES_96 SS_NAMES_64 ", " SS_N2
#define SS_NAMES_128 SS_NAMES_96 ", " SS_N3
#define SS_NAMES_160 SS_NAMES_128 ", " SS_N4
#define SS_NAMES_192 SS_NAMES_160 ", " SS_N5
#define SS_NAMES_224 SS_NAMES_192 ", " SS_N6
#define SS_NAMES_256 SS_NAMES_224 ", " SS_N7

#define SS_D4(c, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3])
#define SS_D16(c, i) SS_D4(c, i), SS_D4(c, i + 4), SS_D4(c, i + 8), SS_D4(c, i + 12)
#define SS_D_32(c) SS_D16(c, 0)
#define SS_D_64(c) SS_D_32(c), SS_D16(c, 16)
#define SS_D_96(c) SS_D_64(c), SS_D16(c, 32)
#define SS_D_128(c) SS_D_96(c), SS_D16(c, 48)
#define SS_D_160(c) SS_D_128(c), SS_D16(c, 64)
#define SS_D_192(c) SS_D_160(c), SS_D16(c, 80)
#define SS_D_224(c) SS_D_192(c), SS_D16(c, 96)
#define SS_D_256(c) SS_D_224(c), SS_D16(c, 112)

// d [64, N] (+)= a [64, 64] * b [N, 64]^T for one step of 64 along K: a and b are descriptors, a's kept values 32 bytes
// a row; without `add` d is overwritten. Every lane holds metadata ("0": the only selector that 8-bit types have).
template <int Type, int N>
struct SparseProduct;

#define SS_SPARSE_PRODUCT(TYPE, SUM, C, TYPES, TAIL, N, A, B, META, ADD)                                              \
  template <>                                                                                                         \
  struct SparseProduct<TYPE, N> {                                                                                     \
    static __device__ inline void issue(SUM (&d)[N / 2], uint64_t a, uint64_t b, uint32_t metadata, int add) {        \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #ADD ", 0;\n"                                             \
                   "wgmma.mma_async.sp.sync.aligned.m64n" #N "k64" TYPES " {" SS_NAMES_##N "}, %" #A ", %" #B         \
                   ", %" #META ", 0, add" TAIL ";\n}"                                                                 \
                   : SS_D_##N(C)                                                                                      \
                   : "l"(a), "l"(b), "r"(metadata), "r"(add));                                                        \
    }                                                                                                                 \
  };
// The four numbers: operands that follow the accumulators.
#define SS_SPARSE_PRODUCTS(...)                                                                                       \
  SS_SPARSE_PRODUCT(__VA_ARGS__, 32, 16, 17, 18, 19)                                                                  \
  SS_SPARSE_PRODUCT(__VA_ARGS__, 64, 32, 33, 34, 35)                                                                  \
  SS_SPARSE_PRODUCT(__VA_ARGS__, 96, 48, 49, 50, 51)                                                                  \
  SS_SPARSE_PRODUCT(__VA_ARGS__, 128, 64, 65, 66, 67)                                                                 \
  SS_SPARSE_PRODUCT(__VA_ARGS__, 160, 80, 81, 82, 83)                                                                 \
  SS_SPARSE_PRODUCT(__VA_ARGS__, 192, 96, 97, 98, 99)                                                                 \
  SS_SPARSE_PRODUCT(__VA_ARGS__, 224, 112, 113, 114, 115)                                                             \
  SS_SPARSE_PRODUCT(__VA_ARGS__, 256, 128, 129, 130, 131)

SS_SPARSE_PRODUCTS(SS_INT8, int, "+r", ".s32.s8.s8", "")
SS_SPARSE_PRODUCTS(SS_FP8_E4M3, float, "+f", ".f32.e4m3.e4m3", ", 1, 1")

#undef SS_SPARSE_PRODUCTS
#undef SS_SPARSE_PRODUCT

#endif  // SS_HAS_WGMMA

}  // namespace slidesparse::wgmma
