#include "status.h"

namespace slidesparse {

namespace {
thread_local std::string last_error;
}

const char* type_name(int type) {
  switch (type) {
    case SS_INT8: return "INT8";
    case SS_FP8_E4M3: return "FP8E4M3";
    case SS_BF16: return "BF16";
    case SS_FP16: return "FP16";
    case SS_INT32: return "INT32";
    case SS_FP32: return "FP32";
  }
  return "unknown type";
}

std::string describe(const ss_problem& p) {
  return "M=" + std::to_string(p.m) + " N=" + std::to_string(p.n) + " K=" + std::to_string(p.k) + " " +
         type_name(p.input) + " -> " + type_name(p.output);
}

void set_error(const std::string& text) { last_error = text; }

}  // namespace slidesparse

extern "C" const char* ss_error(void) { return slidesparse::last_error.c_str(); }
extern "C" int ss_abi_version(void) { return SS_ABI_VERSION; }
