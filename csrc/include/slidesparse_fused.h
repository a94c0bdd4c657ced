/* C interface of our own sparse GEMM, with the whole epilogue in it:
 *
 *     out[m, n] = bf16((float(acc[m, n]) * token_scale[m]) * channel_scale[n] + bias[n])
 *     acc[m, n] = sum over k of x[m, k] * w[n, k]     (INT8: exact in int32; FP8: float32)
 *
 * x [m, k] and out [m, n] are row-major and dense in memory, 16-byte aligned; w is 2:4 along k and packed
 * (kernels/fused_pack.py says how, a layout a family). m is any, n a multiple of 8, k (K', the lifted K) of 32.
 * Nothing is allocated, no workspace is needed, and every call may be captured in a CUDA graph.
 *
 * Every function returns 0, or -1 with a one-line text in ss_fused_error(); -2 where this GPU or this size is not
 * supported. ss_fused_configs needs no GPU. All functions may be called from several threads.
 */
#ifndef SLIDESPARSE_FUSED_H
#define SLIDESPARSE_FUSED_H

#include "slidesparse_gemm.h" /* ss_type */

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

#define SS_FUSED_ABI_VERSION 1

/* Which instructions multiply, and so how weights are packed. */
typedef enum {
  SS_FUSED_WGMMA = 0, /* sm_90a: wgmma.mma_async.sp, operands in shared memory */
  SS_FUSED_MMA = 1    /* sm_80 and later: mma.sp.sync, operands in registers; FP8 from sm_89 */
} ss_fused_family;

typedef struct {
  int64_t m, n, k;
  int32_t type;   /* SS_INT8 or SS_FP8_E4M3 */
  int32_t family; /* ss_fused_family */
} ss_fused_problem;

/* One way to run a problem. Sizes in elements. */
typedef struct {
  char name[64];            /* what a tuning store keeps; the same code has the same name */
  int32_t index;            /* in the family's table */
  int32_t channels, tokens; /* of a block's tile of out */
  int32_t k;                /* of a stage */
  int32_t stages;
  int32_t cluster_channels, cluster_tokens; /* blocks of a cluster along n and m: they share what they load */
  int32_t split_k;          /* blocks that share one tile along k */
  int32_t group;            /* token tiles that are walked together, for the L2 cache */
  int32_t head_start;       /* stages by which one half of a block is ahead, so that their epilogues do not coincide */
} ss_fused_config;

typedef struct {
  const void* x;
  const void* packed;
  const float* token_scale;   /* [m] */
  const float* channel_scale; /* [n] */
  const void* bias;           /* bfloat16 [n], 4-byte aligned, or NULL */
  void* out;                  /* bfloat16 [m, n] */
} ss_fused_operands;

int ss_fused_abi_version(void);
const char* ss_fused_error(void);

/* The ways to run a problem on a GPU of this compute capability (90 for 9.0), a good guess first. None: *found is 0,
 * the result -2, and ss_fused_error() says why. */
int ss_fused_configs(int capability, const ss_fused_problem*, ss_fused_config* list, int capacity, int* found);

/* Launches on `stream`, on the current device, without waiting. */
int ss_fused_gemm(const ss_fused_problem*, const ss_fused_config*, const ss_fused_operands*, void* stream);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
