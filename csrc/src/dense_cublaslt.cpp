// Dense W8A8 (and BF16, FP16) GEMM through cuBLASLt.
//
// cuBLASLt is column-major: our row-major out[m, n] is its D[n, m], our w[n, k] its A (transposed, k x n),
// our x[m, k] its B (k x m). This "TN" form is the only one that FP8 and INT8 tensor cores take.
#include <cstdint>
#include <mutex>

#include "libraries.h"
#include "plan_cache.h"

namespace slidesparse {
namespace {

// One per device: a cuBLASLt handle is thread-safe, and belongs to the device current at its creation.
cublasLtHandle_t handle(const ss_problem& problem) {
  static std::mutex mutex;
  static std::unordered_map<int, cublasLtHandle_t> handles;
  std::lock_guard<std::mutex> lock(mutex);
  auto& slot = handles[problem.device];
  if (slot == nullptr) cublaslt().check(cublaslt().Create(&slot), "Create", problem);
  return slot;
}

// Stands for a pointer that is not known yet. Never dereferenced.
const void* const kAligned = reinterpret_cast<const void*>(uintptr_t{256});

class Plan {
 public:
  explicit Plan(const ss_problem& problem) : problem_(problem), lt_(cublaslt()) {
    const bool integer = problem.input == SS_INT8;
    const auto scale_type = integer ? CUDA_R_32I : CUDA_R_32F;
    const auto compute = integer ? CUBLAS_COMPUTE_32I : CUBLAS_COMPUTE_32F;
    if (problem.epilogue != SS_PLAIN && problem.input != SS_FP8_E4M3)
      throw Unsupported("cuBLASLt fuses per-token and per-channel scales for FP8E4M3 only: " + describe(problem));
    lt_.check(lt_.MatmulDescCreate(&operation, compute, scale_type), "MatmulDescCreate", problem);
    set(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
    set(CUBLASLT_MATMUL_DESC_TRANSB, CUBLAS_OP_N);
    // Fast accumulation: FP8 products are added in the tensor core's own width, as every FP8 engine runs them.
    if (problem.input == SS_FP8_E4M3) set(CUBLASLT_MATMUL_DESC_FAST_ACCUM, int8_t{1});
    if (problem.epilogue != SS_PLAIN) {
      // NOTES: without pointers the heuristic answers "unsupported value"; it looks at their alignment only, and
      // every call sets its own before it runs.
      set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, kAligned);
      set(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, kAligned);
      set(CUBLASLT_MATMUL_DESC_A_SCALE_MODE, int32_t{CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F});
      set(CUBLASLT_MATMUL_DESC_B_SCALE_MODE, int32_t{CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F});
    }
    if (problem.epilogue == SS_SCALED_BIAS) {
      set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
      set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, CUDA_R_16BF);
      set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, kAligned);
    }
    layout(&a, problem.input, problem.k, problem.n, problem.k);
    layout(&b, problem.input, problem.k, problem.m, problem.k);
    layout(&d, problem.output, problem.n, problem.m, problem.n);
  }
  ~Plan() {
    for (auto matrix : {a, b, d})
      if (matrix != nullptr) lt_.MatrixLayoutDestroy(matrix);
    if (operation != nullptr) lt_.MatmulDescDestroy(operation);
  }
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  template <class T>
  void set(cublasLtMatmulDescAttributes_t attribute, T value) {
    lt_.check(lt_.MatmulDescSetAttribute(operation, attribute, &value, sizeof(value)), "MatmulDescSetAttribute",
              problem_);
  }

  cublasLtMatmulDesc_t operation = nullptr;
  cublasLtMatrixLayout_t a = nullptr, b = nullptr, d = nullptr;
  std::mutex mutex;  // scale and bias pointers are attributes of the shared descriptor

 private:
  void layout(cublasLtMatrixLayout_t* matrix, int type, int64_t rows, int64_t columns, int64_t stride) {
    lt_.check(lt_.MatrixLayoutCreate(matrix, cuda_type(type), rows, columns, stride), "MatrixLayoutCreate", problem_);
  }
  ss_problem problem_;
  const CublasLt& lt_;
};

PlanCache<Plan>& plans() {
  static PlanCache<Plan> cache;
  return cache;
}

template <class T>
int config(const cublasLtMatmulAlgo_t& algorithm, cublasLtMatmulAlgoConfigAttributes_t attribute) {
  T value{};
  size_t written = 0;
  const auto status = cublaslt().MatmulAlgoConfigGetAttribute(&algorithm, attribute, &value, sizeof(value), &written);
  return status == CUBLAS_STATUS_SUCCESS ? static_cast<int>(value) : -1;
}

static_assert(sizeof(cublasLtMatmulAlgo_t) == sizeof(ss_algorithm::opaque), "cuBLASLt's algorithm is 64 bytes");

}  // namespace

int dense_plans() { return plans().size(); }

}  // namespace slidesparse

using namespace slidesparse;

extern "C" int ss_dense_algorithms(const ss_problem* problem, size_t workspace_limit, ss_algorithm* list, int capacity,
                                   int* found) {
  return guarded([&] {
    const auto& lt = cublaslt();
    Plan plan(*problem);
    cublasLtMatmulPreference_t preference = nullptr;
    lt.check(lt.MatmulPreferenceCreate(&preference), "MatmulPreferenceCreate", *problem);
    std::unique_ptr<cublasLtMatmulPreferenceOpaque_t, decltype(lt.MatmulPreferenceDestroy)> owner(
        preference, lt.MatmulPreferenceDestroy);
    lt.check(lt.MatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace_limit,
                                             sizeof(workspace_limit)),
             "MatmulPreferenceSetAttribute", *problem);
    std::unique_ptr<cublasLtMatmulHeuristicResult_t[]> results(new cublasLtMatmulHeuristicResult_t[capacity]);
    int count = 0;
    lt.check(lt.MatmulAlgoGetHeuristic(handle(*problem), plan.operation, plan.a, plan.b, plan.d, plan.d, preference,
                                       capacity, results.get(), &count),
             "MatmulAlgoGetHeuristic", *problem);
    *found = 0;
    for (int i = 0; i < count; ++i) {
      if (results[i].state != CUBLAS_STATUS_SUCCESS) continue;
      ss_algorithm& out = list[(*found)++];
      const auto& algorithm = results[i].algo;
      std::memcpy(out.opaque, &algorithm, sizeof(algorithm));
      out.workspace = results[i].workspaceSize;
      out.waves = results[i].wavesCount;
      out.alg_id = config<int32_t>(algorithm, CUBLASLT_ALGO_CONFIG_ID);
      out.split_k = config<int32_t>(algorithm, CUBLASLT_ALGO_CONFIG_SPLITK_NUM);
      out.tile = config<uint32_t>(algorithm, CUBLASLT_ALGO_CONFIG_TILE_ID);
      out.stages = config<uint32_t>(algorithm, CUBLASLT_ALGO_CONFIG_STAGES_ID);
      out.cluster = config<uint16_t>(algorithm, CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID);
    }
  });
}

extern "C" int ss_dense_gemm(const ss_problem* problem, const ss_algorithm* algorithm, const void* x, const void* w,
                             const float* token_scale, const float* channel_scale, const void* bias, void* out,
                             void* workspace, size_t workspace_bytes, void* stream) {
  return guarded([&] {
    const auto& lt = cublaslt();
    // The algorithm is not part of a dense plan: descriptors serve them all.
    auto plan = plans().get(plan_key(*problem, nullptr), [&] { return std::make_shared<Plan>(*problem); });
    if (workspace_bytes < algorithm->workspace)
      throw Error("cuBLASLt Matmul " + describe(*problem) + ": workspace of " + std::to_string(workspace_bytes) +
                  " bytes, algorithm needs " + std::to_string(algorithm->workspace));
    cublasLtMatmulAlgo_t chosen;
    std::memcpy(&chosen, algorithm->opaque, sizeof(chosen));
    const int32_t int_one = 1, int_zero = 0;
    const float one = 1.0f, zero = 0.0f;
    const bool integer = problem->input == SS_INT8;
    const void* alpha = integer ? static_cast<const void*>(&int_one) : &one;
    const void* beta = integer ? static_cast<const void*>(&int_zero) : &zero;
    std::lock_guard<std::mutex> lock(plan->mutex);
    if (problem->epilogue != SS_PLAIN) {
      plan->set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, channel_scale);
      plan->set(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, token_scale);
    }
    if (problem->epilogue == SS_SCALED_BIAS) plan->set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
    lt.check(lt.Matmul(handle(*problem), plan->operation, alpha, w, plan->a, x, plan->b, beta, out, plan->d, out,
                       plan->d, &chosen, workspace, workspace_bytes, static_cast<cudaStream_t>(stream)),
             "Matmul", *problem);
  });
}
