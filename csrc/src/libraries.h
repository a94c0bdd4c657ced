// cuBLASLt and cuSPARSELt as tables of functions, loaded by path at run time.
//
// NOTES: by path, because two builds of cuSPARSELt with one soname may be installed (the one that PyTorch
// pins, and nvidia-cusparselt-cu12, which we use); and so that this library builds and loads without a GPU.
#pragma once

#include <cublasLt.h>
#include <cusparseLt.h>

#include <string>

#include "status.h"

namespace slidesparse {

struct CublasLt {
#define SLIDESPARSE_CUBLASLT(F)                                                                                      \
  F(Create) F(GetVersion) F(GetStatusString) F(MatmulDescCreate) F(MatmulDescDestroy) F(MatmulDescSetAttribute)      \
  F(MatrixLayoutCreate) F(MatrixLayoutDestroy) F(MatmulPreferenceCreate) F(MatmulPreferenceDestroy)                  \
  F(MatmulPreferenceSetAttribute) F(MatmulAlgoGetHeuristic) F(MatmulAlgoConfigGetAttribute) F(MatmulAlgoCheck) F(Matmul)
#define F(name) decltype(&::cublasLt##name) name = nullptr;
  SLIDESPARSE_CUBLASLT(F)
#undef F
  // Throws Error (Unsupported where that is what the status says): library, call, problem, status text.
  void check(cublasStatus_t status, const char* call, const ss_problem& problem) const;
};

struct CusparseLt {
#define SLIDESPARSE_CUSPARSELT(F)                                                                                   \
  F(Init) F(GetVersion) F(GetErrorString) F(DenseDescriptorInit) F(StructuredDescriptorInit) F(MatDescriptorDestroy) \
  F(MatmulDescriptorInit) F(MatmulAlgSelectionInit) F(MatmulAlgSelectionDestroy) F(MatmulAlgSetAttribute)           \
  F(MatmulAlgGetAttribute) F(MatmulPlanInit) F(MatmulPlanDestroy) F(MatmulGetWorkspace) F(SpMMACompressedSize2)     \
  F(SpMMACompress2) F(Matmul)
#define F(name) decltype(&::cusparseLt##name) name = nullptr;
  SLIDESPARSE_CUSPARSELT(F)
#undef F
  void check(cusparseStatus_t status, const char* call, const ss_problem& problem) const;
};

// ss_type -> CUDA's type number. Throws Error for a number that is no ss_type.
cudaDataType_t cuda_type(int type);

// The loaded tables. Throw Error when ss_open has not loaded that library.
const CublasLt& cublaslt();
const CusparseLt& cusparselt();

}  // namespace slidesparse
