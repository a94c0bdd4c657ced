#include "plan_cache.h"

#include "status.h"

namespace slidesparse {
// NOTES: a model has 4 shapes a type, tuning visits a few hundred (shape, M, algorithm); a plan holds a few
// kilobytes of host memory.
std::atomic<int> plan_limit{4096};
}  // namespace slidesparse

extern "C" int ss_plans_cached(void) { return slidesparse::dense_plans() + slidesparse::sparse_plans(); }

extern "C" int ss_set_plan_limit(int plans) {
  return slidesparse::guarded([&] {
    if (plans < 1) throw slidesparse::Error("ss_set_plan_limit: at least 1 plan, not " + std::to_string(plans));
    slidesparse::plan_limit = plans;
  });
}
