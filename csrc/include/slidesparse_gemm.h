/* C interface of the GEMM libraries: cuBLASLt (dense) and cuSPARSELt (2:4 sparse weights).
 *
 * Everywhere out[m, n] = x[m, k] * w[n, k]^T, all row-major and dense in memory. Every function returns
 * 0, or -1 with a one-line text in ss_error(): library, call, shape, status; -2 where the library says that it
 * does not support this on this GPU. Nothing here allocates device memory; workspaces and outputs belong to the
 * caller. Plans are made at a problem's first use and kept in a bounded cache; a call whose plan is cached may be
 * captured in a CUDA graph.
 * All functions may be called from several threads.
 */
#ifndef SLIDESPARSE_GEMM_H
#define SLIDESPARSE_GEMM_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

#define SS_ABI_VERSION 1

typedef enum {
  SS_INT8 = 0,
  SS_FP8_E4M3 = 1,
  SS_BF16 = 2,
  SS_FP16 = 3,
  SS_INT32 = 4,
  SS_FP32 = 5
} ss_type;

/* What is fused into the GEMM. Scales: float per token [m] and per output channel [n]. */
typedef enum { SS_PLAIN = 0, SS_SCALED = 1, SS_SCALED_BIAS = 2 } ss_epilogue;

typedef struct {
  int64_t m, n, k;
  int32_t input;    /* ss_type of x and w */
  int32_t output;   /* ss_type of out */
  int32_t epilogue; /* ss_epilogue */
  int32_t device;   /* CUDA device ordinal: part of the plan key */
} ss_problem;

typedef struct {
  uint64_t opaque[8]; /* cuBLASLt: the library's own algorithm description; cuSPARSELt: unused */
  uint64_t workspace; /* bytes needed */
  int32_t alg_id;
  int32_t split_k; /* 1: none; -1: segment-K (cuSPARSELt on Hopper) */
  int32_t tile, stages, cluster;
  float waves;
} ss_algorithm;

int ss_abi_version(void);

/* Load the libraries from these files (NULL: leave that library out). A second call with the same paths
 * does nothing; with others it fails, because plans of the first would outlive it. */
int ss_open(const char* cublaslt, const char* cusparselt);
const char* ss_error(void);
/* Version number as the loaded library reports it, 0 if it is not loaded. */
size_t ss_cublaslt_version(void);
int ss_cusparselt_version(void);

/* Dense. Lists up to `capacity` algorithms, the library's favourite first. */
int ss_dense_algorithms(const ss_problem*, size_t workspace_limit, ss_algorithm* list, int capacity, int* found);
int ss_dense_gemm(const ss_problem*, const ss_algorithm*, const void* x, const void* w, const float* token_scale,
                  const float* channel_scale, const void* bias, void* out, void* workspace, size_t workspace_bytes,
                  void* stream);

/* Sparse: w is 2:4 along k. The compressed form does not depend on m, the output type or the algorithm. */
int ss_sparse_algorithms(const ss_problem*, ss_algorithm* list, int capacity, int* found);
int ss_sparse_compressed_bytes(const ss_problem*, size_t* compressed, size_t* scratch);
int ss_sparse_compress(const ss_problem*, const void* w, void* compressed, void* scratch, void* stream);
int ss_sparse_gemm(const ss_problem*, const ss_algorithm*, const void* x, const void* compressed, void* out,
                   void* workspace, size_t workspace_bytes, void* stream);

/* Plans kept; and how many may be (the least recently used goes first). */
int ss_plans_cached(void);
int ss_set_plan_limit(int plans);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
