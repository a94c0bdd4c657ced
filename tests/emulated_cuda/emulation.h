// A block of a CUDA kernel on the CPU: every thread is a fiber, and what threads do together, they wait for.
//
// It is a hostile GPU. Warps run one after another, in another random order after each meeting of the block, as far as
// they get; an asynchronous copy arrives at once or not before it is waited for, as a coin falls; shared memory holds
// garbage at first. What a real GPU might do once in a million launches goes wrong here at once.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace emulated {

constexpr int kLanes = 32;
constexpr int kStackBytes = 1 << 16;

// Threads that do something together: the last one to arrive does it for all.
struct Meeting {
  const char* what = nullptr;
  std::vector<int> waiting;
  std::vector<void*> theirs;
};

struct Copy {
  void* to;
  const void* from;
  int bytes, whole;  // zeros from `bytes` to `whole`
};

struct Thread {
  ucontext_t context;
  std::vector<std::vector<Copy>> groups;  // copies under way, the last group still open
  bool done = false;
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Meeting> warps;
  Meeting all;
  std::vector<std::vector<int>> ready;  // by warp
  std::vector<int> order;               // of warps: who may run first
  int current = 0, index = 0;
  ucontext_t scheduler;
  std::function<void()> body;
};

// What one library keeps from launch to launch.
struct State {
  Block* block = nullptr;
  std::mt19937 chance{1};
  std::string error;                                          // the first one of a launch
  bool ends_threads = false;                                  // a thread with an error goes no further
  std::vector<std::pair<const char*, const char*>> readable;  // where copies may read; empty: anywhere
  long long conflicts = 0, wavefronts = 0;                    // of ldmatrix
  std::vector<std::unique_ptr<char[]>> stacks;                // of the threads of any block
};
inline State& state() {
  static State only;
  return only;
}
inline Block& block() { return *state().block; }

inline void yield() { swapcontext(&block().threads[block().current].context, &block().scheduler); }

inline void complain(const std::string& what) {
  if (state().error.empty())
    state().error =
        "block " + std::to_string(block().index) + ", thread " + std::to_string(block().current) + ": " + what;
  while (state().ends_threads) yield();
}

// `act` gets what each member brought, in the order of their lanes or threads.
inline void meet(Meeting& meeting, int members, const char* what, void* mine,
                 const std::function<void(const std::vector<void*>&)>& act) {
  Block& b = block();
  const int first = &meeting == &b.all ? 0 : b.current / kLanes * kLanes;
  if (meeting.waiting.empty()) {
    meeting.what = what;
    meeting.theirs.assign(members, nullptr);
  } else if (std::strcmp(meeting.what, what) != 0) {
    complain(std::string(what) + " where others of the warp are at " + meeting.what);
  }
  meeting.theirs[b.current - first] = mine;
  meeting.waiting.push_back(b.current);
  if (int(meeting.waiting.size()) < members) return yield();
  act(meeting.theirs);
  for (int thread : meeting.waiting)
    if (thread != b.current) b.ready[thread / kLanes].push_back(thread);
  meeting.waiting.clear();
  if (&meeting == &b.all) std::shuffle(b.order.begin(), b.order.end(), state().chance);
  b.ready[b.current / kLanes].push_back(b.current);
  yield();
}
inline void meet_warp(const char* what, void* mine, const std::function<void(const std::vector<void*>&)>& act) {
  meet(block().warps[block().current / kLanes], kLanes, what, mine, act);
}

inline void arrive(const Copy& copy) {
  std::memcpy(copy.to, copy.from, copy.bytes);
  std::memset(static_cast<char*>(copy.to) + copy.bytes, 0, copy.whole - copy.bytes);
}
inline void copy_later(const Copy& copy) {
  const char* from = static_cast<const char*>(copy.from);
  if (reinterpret_cast<uintptr_t>(copy.to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) complain("an odd address");
  bool known = copy.bytes == 0 || state().readable.empty();
  for (const auto& [begin, end] : state().readable) known |= from >= begin && from + copy.bytes <= end;
  if (!known) return complain("a copy reads outside its operands");
  if (state().chance() % 2)
    arrive(copy);
  else
    block().threads[block().current].groups.back().push_back(copy);
}
inline void close_group() { block().threads[block().current].groups.emplace_back(); }
inline void wait_groups(int pending) {
  auto& groups = block().threads[block().current].groups;
  while (int(groups.size()) - 1 > pending) {
    for (const Copy& copy : groups.front()) arrive(copy);
    groups.erase(groups.begin());
  }
}

inline void thread_main() {
  block().body();
  block().threads[block().current].done = true;
  for (;;) yield();
}

// Threads that wait to run `body`; their stacks are `first_stack` and the following.
inline void prepare(Block& b, int index, int threads, const std::function<void()>& body, int first_stack) {
  b.index = index;
  b.body = body;
  b.threads.resize(threads);
  b.warps.resize(threads / kLanes);
  b.ready.resize(threads / kLanes);
  for (int warp = 0; warp < threads / kLanes; ++warp) b.order.push_back(warp);
  std::shuffle(b.order.begin(), b.order.end(), state().chance);
  for (int i = 0; i < threads; ++i) {
    Thread& thread = b.threads[i];
    thread.groups.emplace_back();
    while (first_stack + i >= int(state().stacks.size())) state().stacks.emplace_back(new char[kStackBytes]);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = state().stacks[first_stack + i].get();
    thread.context.uc_stack.ss_size = kStackBytes;
    thread.context.uc_link = &b.scheduler;
    makecontext(&thread.context, thread_main, 0);
    b.ready[i / kLanes].push_back(i);
  }
}

// One of those of a warp that are ready runs until it waits for somebody.
inline void run_one(Block& b, int warp) {
  state().block = &b;
  auto& ready = b.ready[warp];
  std::swap(ready[state().chance() % ready.size()], ready.back());
  b.current = ready.back();
  ready.pop_back();
  swapcontext(&b.scheduler, &b.threads[b.current].context);
}

inline void run_block(int index, int threads, const std::function<void()>& body) {
  Block b;
  prepare(b, index, threads, body, 0);
  for (;;) {
    const auto warp = std::find_if(b.order.begin(), b.order.end(), [&](int w) { return !b.ready[w].empty(); });
    if (warp == b.order.end()) break;
    run_one(b, *warp);
  }
  for (b.current = 0; b.current < threads; ++b.current)
    if (!b.threads[b.current].done) complain("waits for ever");
}

}  // namespace emulated
