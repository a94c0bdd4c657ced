/* C interface of the tensor-core microbenchmark: how fast this GPU can issue matrix instructions, and nothing else.
 *
 * A run starts one block on every multiprocessor. Its units (warps, or warpgroups of 4 warps) multiply operands that
 * lie ready (in shared memory or registers, as the instruction wants them) again and again:
 *     out[unit] = sum over i < iterations of a[i % stages][unit] * b[i % stages]^T
 * and, if asked, other threads of the block load from global into shared memory all the while, as fast as they can.
 * The instruction that is timed can be checked: `out` is that very sum.
 *
 * Every function returns 0, or -1 with a one-line text in ss_peak_error(). ss_peak_forms needs no GPU. ss_peak_run
 * launches on `stream` without waiting, allocates nothing, and may be captured in a CUDA graph after its first call.
 */
#ifndef SLIDESPARSE_PEAK_H
#define SLIDESPARSE_PEAK_H

#include "slidesparse_gemm.h" /* ss_type */

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

/* Counts up with every change of the interface, and of what is measured: older results are then measured again. */
#define SS_PEAK_ABI_VERSION 1

typedef enum {
  SS_WGMMA = 0,   /* sm_90a: wgmma.mma_async, both operands in shared memory; a unit is a warpgroup */
  SS_MMA_SYNC = 1 /* sm_80 and later: mma.sync, operands in registers; a unit is a warp */
} ss_peak_family;

/* One way to issue the instruction. Sizes in elements; k counts the zeros of a sparse operand too. */
typedef struct {
  char instruction[120]; /* for people: what is issued, by how many */
  int32_t family;
  int32_t type;       /* SS_INT8, SS_FP8_E4M3, SS_BF16 or SS_FP16 */
  int32_t sparse;     /* 1: a is 2:4 */
  int32_t units;      /* of one block */
  int32_t rows, cols; /* of one unit's tile of out */
  int32_t k;          /* of one stage */
  int32_t k_steps;    /* instructions along the k of a stage */
  int32_t stages;     /* operand sets that iterations take turns with */
} ss_peak_form;

typedef struct {
  const void* a;            /* [stages][units][rows][k], sparse: the kept values, [k / 2] */
  const void* b;            /* [stages][cols][k] */
  /* Sparse: [k_steps][units][rows / 16][32], the registers of a warp for 16 rows; the same for all stages. */
  const uint32_t* metadata;
  const void* source;       /* what is loaded meanwhile, aligned to 128 bytes; NULL: no loads */
  size_t source_bytes;      /* at least SS_PEAK_SOURCE_MIN */
  unsigned long long* loaded; /* with `source`: bytes loaded are added here */
  void* out;                  /* NULL, or [units][rows][cols] of the first block: int32 for SS_INT8, else float */
} ss_peak_operands;

#define SS_PEAK_SOURCE_MIN ((size_t)1 << 20)

int ss_peak_abi_version(void);
const char* ss_peak_error(void);

/* The forms for a GPU of this compute capability (90 for 9.0), all worth trying. None: *found is 0, the result 0, and
 * ss_peak_error() says why. */
int ss_peak_forms(int capability, int type, int sparse, ss_peak_form* list, int capacity, int* found);

/* `multiprocessors` receives the blocks started, so that
 * 2 * multiprocessors * iterations * units * rows * cols * k operations are under way. All pointers: device memory. */
int ss_peak_run(const ss_peak_form*, const ss_peak_operands*, int device, int iterations, int* multiprocessors,
                void* stream);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
