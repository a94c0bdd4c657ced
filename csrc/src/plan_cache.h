// Plans by problem and algorithm: bounded, least recently used out first, safe for several threads.
#pragma once

#include <atomic>
#include <cstring>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>

#include "slidesparse_gemm.h"

namespace slidesparse {

// Fields one by one: the structs' padding bytes are not part of the key.
inline std::string plan_key(const ss_problem& p, const ss_algorithm* a) {
  std::string key;
  auto add = [&key](const auto& value) { key.append(reinterpret_cast<const char*>(&value), sizeof(value)); };
  add(p.m), add(p.n), add(p.k), add(p.input), add(p.output), add(p.epilogue), add(p.device);
  if (a != nullptr) add(a->opaque), add(a->alg_id), add(a->split_k);
  return key;
}

extern std::atomic<int> plan_limit;

template <class Plan>
class PlanCache {
 public:
  // The plan of `key`, made by `make` at its first use. A plan in use outlives its eviction (shared ownership).
  std::shared_ptr<Plan> get(const std::string& key, const std::function<std::shared_ptr<Plan>()>& make) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = index_.find(key);
    if (found != index_.end()) {
      order_.splice(order_.begin(), order_, found->second);
      return found->second->second;
    }
    order_.emplace_front(key, make());
    index_[key] = order_.begin();
    while (static_cast<int>(order_.size()) > plan_limit) {
      index_.erase(order_.back().first);
      order_.pop_back();
    }
    return order_.front().second;
  }

  int size() {
    std::lock_guard<std::mutex> lock(mutex_);
    return static_cast<int>(order_.size());
  }

 private:
  using Entry = std::pair<std::string, std::shared_ptr<Plan>>;
  std::mutex mutex_;
  std::list<Entry> order_;
  std::unordered_map<std::string, typename std::list<Entry>::iterator> index_;
};

int dense_plans();
int sparse_plans();

}  // namespace slidesparse
