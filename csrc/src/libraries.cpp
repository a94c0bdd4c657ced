#include "libraries.h"

#include <dlfcn.h>

#include <mutex>

namespace slidesparse {

namespace {

std::mutex mutex;
std::string opened[2];
CublasLt dense_table;
CusparseLt sparse_table;
bool dense_loaded = false, sparse_loaded = false;

void* open_library(const std::string& path) {
  // RTLD_LOCAL: the symbols of a second build with the same soname must not answer for this one.
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw Error("dlopen: " + std::string(dlerror()));
  return library;
}

template <class Function>
void bind(void* library, const std::string& path, const std::string& name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name.c_str()));
  if (function == nullptr) throw Error(path + ": has no function " + name + "; this version is not supported");
}

}  // namespace

void CublasLt::check(cublasStatus_t status, const char* call, const ss_problem& problem) const {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  const std::string text = std::string("cuBLASLt ") + call + " " + describe(problem) + ": " + GetStatusString(status);
  if (status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_ARCH_MISMATCH) throw Unsupported(text);
  throw Error(text);
}

void CusparseLt::check(cusparseStatus_t status, const char* call, const ss_problem& problem) const {
  if (status == CUSPARSE_STATUS_SUCCESS) return;
  const std::string text = std::string("cuSPARSELt ") + call + " " + describe(problem) + ": " + GetErrorString(status);
  if (status == CUSPARSE_STATUS_NOT_SUPPORTED || status == CUSPARSE_STATUS_ARCH_MISMATCH) throw Unsupported(text);
  throw Error(text);
}

cudaDataType_t cuda_type(int type) {
  switch (type) {
    case SS_INT8: return CUDA_R_8I;
    case SS_FP8_E4M3: return CUDA_R_8F_E4M3;
    case SS_BF16: return CUDA_R_16BF;
    case SS_FP16: return CUDA_R_16F;
    case SS_INT32: return CUDA_R_32I;
    case SS_FP32: return CUDA_R_32F;
  }
  throw Error("unknown type number " + std::to_string(type));
}

const CublasLt& cublaslt() {
  if (!dense_loaded) throw Error("cuBLASLt is not loaded: call ss_open with its path first");
  return dense_table;
}

const CusparseLt& cusparselt() {
  if (!sparse_loaded) throw Error("cuSPARSELt is not loaded: call ss_open with its path first");
  return sparse_table;
}

}  // namespace slidesparse

using namespace slidesparse;

extern "C" int ss_open(const char* dense_path, const char* sparse_path) {
  return guarded([&] {
    std::lock_guard<std::mutex> lock(mutex);
    const char* wanted[2] = {dense_path, sparse_path};
    for (int i = 0; i < 2; ++i)
      if (wanted[i] != nullptr && !opened[i].empty() && opened[i] != wanted[i])
        throw Error("ss_open: " + opened[i] + " is loaded; a process can use one build only, not also " + wanted[i]);
    if (dense_path != nullptr && !dense_loaded) {
      void* library = open_library(dense_path);
#define F(name) bind(library, dense_path, "cublasLt" #name, dense_table.name);
      SLIDESPARSE_CUBLASLT(F)
#undef F
      opened[0] = dense_path;
      dense_loaded = true;
    }
    if (sparse_path != nullptr && !sparse_loaded) {
      void* library = open_library(sparse_path);
#define F(name) bind(library, sparse_path, "cusparseLt" #name, sparse_table.name);
      SLIDESPARSE_CUSPARSELT(F)
#undef F
      opened[1] = sparse_path;
      sparse_loaded = true;
    }
  });
}

extern "C" size_t ss_cublaslt_version(void) { return dense_loaded ? dense_table.GetVersion() : 0; }
