// The C interface: which forms a GPU has, and the launch of one of them.
#include <cstdio>
#include <vector>

#include "rate.cuh"

namespace slidesparse {

namespace {

// Where a GPU multiplies fastest: by wgmma on Hopper alone, by mma.sync on Ampere, Ada and the small Blackwells.
// Throws Error with the reason where nothing here measures it.
ss_peak_family family_of(int capability, int type) {
  const std::string here = std::to_string(capability / 10) + "." + std::to_string(capability % 10);
  if (capability < 80) throw Error("2:4 tensor cores need compute capability 8.0 (Ampere), this is " + here);
  if (type == SS_FP8_E4M3 && capability < 89)
    throw Error("FP8E4M3 needs compute capability 8.9 (Ada), this is " + here);
  const int major = capability / 10;
  if (major == 9) return SS_WGMMA;
  if (major == 8 || major == 12) return SS_MMA_SYNC;
  throw Error("unmeasured: compute capability " + here +
              " multiplies by tcgen05 instructions, for which this version has no microbenchmark");
}

struct Types {
  const char* name;  // of sum, a and b, as in PTX
  int bytes;
};

Types types_of(int type) {
  switch (type) {
    case SS_INT8: return {"s32.s8.s8", 1};
    case SS_FP8_E4M3: return {"f32.e4m3.e4m3", 1};
    case SS_BF16: return {"f32.bf16.bf16", 2};
    case SS_FP16: return {"f32.f16.f16", 2};
  }
  throw Error(std::string("no tensor-core rate of ") + type_name(type));
}

ss_peak_form wgmma_form(int type, bool sparse, int cols, int units) {
  const Types types = types_of(type);
  const int k = 128 / types.bytes, k_steps = sparse ? 2 : 4;
  ss_peak_form form{{}, SS_WGMMA, type, sparse, units, 64, cols, k, k_steps, 3};
  std::snprintf(form.instruction, sizeof form.instruction,
                "wgmma.mma_async%s m64n%dk%d %s, %d warpgroup%s, A and B in shared memory", sparse ? ".sp" : "", cols,
                k / k_steps, types.name, units, units == 1 ? "" : "s");
  return form;
}

ss_peak_form mma_sync_form(int type, bool sparse, int units) {
  const Types types = types_of(type);
  const int k = (sparse ? 64 : 32) / types.bytes;
  ss_peak_form form{{}, SS_MMA_SYNC, type, sparse, units, 64, 32, k, 1, 1};
  std::snprintf(form.instruction, sizeof form.instruction, "mma%s.sync m16n8k%d %s, %d warps, A and B in registers",
                sparse ? ".sp" : "", k, types.name, units);
  return form;
}

std::vector<ss_peak_form> forms_of(int capability, int type, bool sparse) {
  if (family_of(capability, type) == SS_WGMMA)
    return {wgmma_form(type, sparse, 256, 2), wgmma_form(type, sparse, 256, 1), wgmma_form(type, sparse, 128, 2)};
  return {mma_sync_form(type, sparse, 8), mma_sync_form(type, sparse, 4), mma_sync_form(type, sparse, 12)};
}

void check_operands(const ss_peak_form& form, const ss_peak_operands& operands, int iterations) {
  const std::string what = form.instruction;
  if (iterations < 1) throw Error(what + ": " + std::to_string(iterations) + " iterations; at least 1");
  if (!operands.a || !operands.b || (form.sparse && !operands.metadata)) throw Error(what + ": an operand is missing");
  if (operands.source == nullptr) return;
  if (operands.loaded == nullptr) throw Error(what + ": loads need a counter for their bytes");
  if (operands.source_bytes < SS_PEAK_SOURCE_MIN || reinterpret_cast<uintptr_t>(operands.source) % 128 != 0)
    throw Error(what + ": the source of loads must be aligned to 128 bytes and hold at least " +
                std::to_string(SS_PEAK_SOURCE_MIN) + " bytes, it holds " + std::to_string(operands.source_bytes));
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute of device " + std::to_string(device));
  return value;
}

}  // namespace

}  // namespace slidesparse

using namespace slidesparse;

extern "C" int ss_peak_abi_version(void) { return SS_PEAK_ABI_VERSION; }

extern "C" const char* ss_peak_error(void) { return ss_error(); }

extern "C" int ss_peak_forms(int capability, int type, int sparse, ss_peak_form* list, int capacity, int* found) {
  return guarded([&] {
    *found = 0;
    types_of(type);
    std::vector<ss_peak_form> forms;
    try {
      forms = forms_of(capability, type, sparse != 0);
    } catch (const Error& reason) {
      set_error(reason.what());
      return;
    }
    for (const ss_peak_form& form : forms)
      if (*found < capacity) list[(*found)++] = form;
  });
}

extern "C" int ss_peak_run(const ss_peak_form* form, const ss_peak_operands* operands, int device, int iterations,
                           int* multiprocessors, void* stream) {
  return guarded([&] {
    check_operands(*form, *operands, iterations);
    check(cudaSetDevice(device), "cudaSetDevice(" + std::to_string(device) + ")");
    const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
    const int minor = attribute(cudaDevAttrComputeCapabilityMinor, device);
    const bool wgmma = form->family == SS_WGMMA;
    if (wgmma ? major != 9 : major * 10 + minor < (form->type == SS_FP8_E4M3 ? 89 : 80))
      throw Error(std::string(form->instruction) + ": not on compute capability " + std::to_string(major) + "." +
                  std::to_string(minor));
    *multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
    const auto bytes = [](const void* pointer) { return static_cast<const uint8_t*>(pointer); };
    const Launch launch{bytes(operands->a),     bytes(operands->b), operands->metadata, bytes(operands->source),
                        operands->source_bytes, operands->loaded,   operands->out,      form->units,
                        iterations};
    (wgmma ? start_wgmma : start_mma_sync)(*form, launch, *multiprocessors, stream);
  });
}
