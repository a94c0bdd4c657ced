// sm_90a: what kernels around wgmma share: shared-memory addresses and descriptors, groups of wgmmas, the copy engine
// and its barriers.
#pragma once

#include <cstdint>

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

// A barrier of `arrivals`; bytes that an arrival announces count as well.
__device__ inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After their initialisation: the copy engine and the other blocks of a cluster may see barriers.
__device__ inline void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// `barrier` may be in another block (`peer_address`). The plain form: with .release.cluster written out the compiler
// puts a fence for the whole GPU before every arrival.
__device__ inline void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// try_wait gives up after a while. The loop is in the text: in C++ it costs a register and two instructions more.
__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "AGAIN_%=:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra AGAIN_%=;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
// The copy engine takes one whole piece; its bytes count towards the barrier.
__device__ inline void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

#endif  // SS_HAS_WGMMA

}  // namespace slidesparse::wgmma
