// 2:4 sparse GEMM through cuSPARSELt: the weight is the structured operand.
//
// cuSPARSELt's D[n, m] in column order is our row-major out[m, n]: structured A = w [n, k] in row order,
// B = x^T [k, m] in column order (our x as it lies in memory).
#include <memory>
#include <mutex>

#include "libraries.h"
#include "plan_cache.h"

namespace slidesparse {
namespace {

constexpr unsigned kAlignment = 16;  // bytes; every tensor that PyTorch allocates has at least this

// One handle a device, made while that device is current. The struct is 11 KB, hence the heap.
const cusparseLtHandle_t* handle(const ss_problem& problem) {
  static std::mutex mutex;
  static std::unordered_map<int, std::unique_ptr<cusparseLtHandle_t>> handles;
  std::lock_guard<std::mutex> lock(mutex);
  auto& slot = handles[problem.device];
  if (slot == nullptr) {
    auto fresh = std::make_unique<cusparseLtHandle_t>();
    cusparselt().check(cusparselt().Init(fresh.get()), "Init", problem);
    slot = std::move(fresh);
  }
  return slot.get();
}

// A matrix descriptor that is destroyed only if it was made.
class Matrix {
 public:
  Matrix() = default;
  ~Matrix() {
    if (made_) cusparselt().MatDescriptorDestroy(&value);
  }
  Matrix(const Matrix&) = delete;
  Matrix& operator=(const Matrix&) = delete;
  void structured(const ss_problem& p) {
    const auto& lt = cusparselt();
    lt.check(lt.StructuredDescriptorInit(handle(p), &value, p.n, p.k, p.k, kAlignment, cuda_type(p.input),
                                         CUSPARSE_ORDER_ROW, CUSPARSELT_SPARSITY_50_PERCENT),
             "StructuredDescriptorInit", p);
    made_ = true;
  }
  void dense(const ss_problem& p, int64_t rows, int type) {
    const auto& lt = cusparselt();
    lt.check(lt.DenseDescriptorInit(handle(p), &value, rows, p.m, rows, kAlignment, cuda_type(type), CUSPARSE_ORDER_COL),
             "DenseDescriptorInit", p);
    made_ = true;
  }
  cusparseLtMatDescriptor_t value;

 private:
  bool made_ = false;
};

// Descriptors of one problem; algorithm and plan on top. cuSPARSELt's plan points into them: they live together.
class Plan {
 public:
  explicit Plan(const ss_problem& p) : problem_(p), lt_(cusparselt()) {
    if (p.epilogue != SS_PLAIN) throw Unsupported("cuSPARSELt fuses no per-token scales: " + describe(p));
    w.structured(p);
    x.dense(p, p.k, p.input);
    out.dense(p, p.n, p.output);
    const auto compute = p.input == SS_INT8 ? CUSPARSE_COMPUTE_32I : CUSPARSE_COMPUTE_32F;
    lt_.check(lt_.MatmulDescriptorInit(handle(p), &operation, CUSPARSE_OPERATION_NON_TRANSPOSE,
                                       CUSPARSE_OPERATION_NON_TRANSPOSE, &w.value, &x.value, &out.value, &out.value,
                                       compute),
              "MatmulDescriptorInit", p);
    lt_.check(lt_.MatmulAlgSelectionInit(handle(p), &selection, &operation, CUSPARSELT_MATMUL_ALG_DEFAULT),
              "MatmulAlgSelectionInit", p);
    selected_ = true;
  }
  ~Plan() {
    if (planned_) lt_.MatmulPlanDestroy(&plan);
    if (selected_) lt_.MatmulAlgSelectionDestroy(&selection);
  }
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  int algorithm_ids() {
    int count = 0;
    lt_.check(lt_.MatmulAlgGetAttribute(handle(problem_), &selection, CUSPARSELT_MATMUL_ALG_CONFIG_MAX_ID, &count,
                                        sizeof(count)),
              "MatmulAlgGetAttribute", problem_);
    return count;
  }

  // Make the plan for an algorithm; false if the library has no such combination.
  bool choose(int alg_id, int split_k, size_t* workspace) {
    const auto* h = handle(problem_);
    if (lt_.MatmulAlgSetAttribute(h, &selection, CUSPARSELT_MATMUL_ALG_CONFIG_ID, &alg_id, sizeof(alg_id)) !=
        CUSPARSE_STATUS_SUCCESS)
      return false;
    // NOTES: setting SPLIT_K to 1 is refused by some algorithms that do not split at all, so 1 is left unset.
    if (split_k != 1 && lt_.MatmulAlgSetAttribute(h, &selection, CUSPARSELT_MATMUL_SPLIT_K, &split_k,
                                                  sizeof(split_k)) != CUSPARSE_STATUS_SUCCESS)
      return false;
    if (lt_.MatmulPlanInit(h, &plan, &operation, &selection) != CUSPARSE_STATUS_SUCCESS) return false;
    planned_ = true;
    return lt_.MatmulGetWorkspace(h, &plan, workspace) == CUSPARSE_STATUS_SUCCESS;
  }

  Matrix w, x, out;
  cusparseLtMatmulDescriptor_t operation;
  cusparseLtMatmulAlgSelection_t selection;
  cusparseLtMatmulPlan_t plan;

 private:
  ss_problem problem_;
  const CusparseLt& lt_;
  bool selected_ = false, planned_ = false;
};

PlanCache<Plan>& plans() {
  static PlanCache<Plan> cache;
  return cache;
}

// -1 is segment-K (Hopper), above 1 split-K: those that published searches found among the winners.
constexpr int kSplits[] = {1, -1, 2, 4, 8};

}  // namespace

int sparse_plans() { return plans().size(); }

}  // namespace slidesparse

using namespace slidesparse;

extern "C" int ss_cusparselt_version(void) {
  ss_problem none{};
  int version = 0;
  guarded([&] { cusparselt().check(cusparselt().GetVersion(handle(none), &version), "GetVersion", none); });
  return version;
}

extern "C" int ss_sparse_algorithms(const ss_problem* problem, ss_algorithm* list, int capacity, int* found) {
  return guarded([&] {
    *found = 0;
    const int ids = Plan(*problem).algorithm_ids();
    for (int id = 0; id < ids; ++id) {
      for (int split : kSplits) {
        Plan plan(*problem);
        size_t workspace = 0;
        if (*found >= capacity || !plan.choose(id, split, &workspace)) continue;
        ss_algorithm& out = list[(*found)++];
        out = ss_algorithm{};
        out.alg_id = id;
        out.split_k = split;
        out.workspace = workspace;
      }
    }
  });
}

extern "C" int ss_sparse_compressed_bytes(const ss_problem* problem, size_t* compressed, size_t* scratch) {
  return guarded([&] {
    Matrix w;
    w.structured(*problem);
    const auto& lt = cusparselt();
    lt.check(lt.SpMMACompressedSize2(handle(*problem), &w.value, compressed, scratch), "SpMMACompressedSize2", *problem);
  });
}

extern "C" int ss_sparse_compress(const ss_problem* problem, const void* dense, void* compressed, void* scratch,
                                  void* stream) {
  return guarded([&] {
    Matrix w;
    w.structured(*problem);
    const auto& lt = cusparselt();
    lt.check(lt.SpMMACompress2(handle(*problem), &w.value, 1, CUSPARSE_OPERATION_NON_TRANSPOSE, dense, compressed,
                               scratch, static_cast<cudaStream_t>(stream)),
             "SpMMACompress2", *problem);
  });
}

extern "C" int ss_sparse_gemm(const ss_problem* problem, const ss_algorithm* algorithm, const void* x,
                              const void* compressed, void* out, void* workspace, size_t workspace_bytes,
                              void* stream) {
  return guarded([&] {
    const auto& lt = cusparselt();
    auto plan = plans().get(plan_key(*problem, algorithm), [&] {
      auto fresh = std::make_shared<Plan>(*problem);
      size_t needed = 0;
      if (!fresh->choose(algorithm->alg_id, algorithm->split_k, &needed))
        throw Error("cuSPARSELt MatmulPlanInit " + describe(*problem) + ": no algorithm " +
                    std::to_string(algorithm->alg_id) + " with split-K " + std::to_string(algorithm->split_k));
      return fresh;
    });
    if (workspace_bytes < algorithm->workspace)
      throw Error("cuSPARSELt Matmul " + describe(*problem) + ": workspace of " + std::to_string(workspace_bytes) +
                  " bytes, algorithm needs " + std::to_string(algorithm->workspace));
    const float one = 1.0f, zero = 0.0f;
    auto queue = static_cast<cudaStream_t>(stream);
    lt.check(lt.Matmul(handle(*problem), &plan->plan, &one, compressed, x, &zero, out, out, workspace, &queue, 1),
             "Matmul", *problem);
  });
}
