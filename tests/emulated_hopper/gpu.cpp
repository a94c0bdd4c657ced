#include "gpu.h"

#include <algorithm>

namespace emulated {

namespace {

// Shared memory and its shadow are large: kept from launch to launch.
struct Memory {
  std::unique_ptr<uint8_t[]> bytes{new uint8_t[kSharedBytes + 1024]};
  Shadow shadow;

  uint8_t* begin() { return bytes.get() + (1024 - reinterpret_cast<uintptr_t>(bytes.get()) % 1024); }
};

// How a launch goes: how often warps lose their turn, and copies happen.
struct Mood {
  int turns, copies;
};

std::string offset_text(int offset) { return "shared memory + " + std::to_string(offset); }

void stuck(Cluster& cluster) {
  for (GpuBlock* block : cluster.blocks) {
    state().block = block;
    for (const auto& barrier : block->barriers)
      for (const Waiter& waiter : barrier->waiting) {
        waiter.block->current = waiter.thread;
        complain("waits for ever for the barrier at " + offset_text(barrier->offset) + ": " +
                 std::to_string(barrier->pending) + " arrivals and " + std::to_string(barrier->bytes) +
                 " bytes are missing in phase " + std::to_string(barrier->completed));
      }
    for (block->current = 0; block->current < int(block->threads.size()); ++block->current)
      if (!block->threads[block->current].done) complain("waits for ever");
  }
}

bool happen(std::vector<std::function<void()>>& acts) {
  if (acts.empty()) return false;
  std::swap(acts[chance(int(acts.size()))], acts.back());
  const std::function<void()> act = std::move(acts.back());
  acts.pop_back();
  act();
  return true;
}

void run_cluster(Cluster& cluster) {
  static const int kTurns[] = {1, 8, 64, 4096}, kCopies[] = {2, 8, 32, 1024};
  const Mood mood{kTurns[chance(4)], kCopies[chance(4)]};
  std::vector<std::pair<GpuBlock*, int>> order;
  for (GpuBlock* block : cluster.blocks)
    for (int warp = 0; warp < int(block->ready.size()); ++warp) order.emplace_back(block, warp);
  std::shuffle(order.begin(), order.end(), state().chance);
  while (state().error.empty()) {
    if (chance(mood.turns) == 0) std::shuffle(order.begin(), order.end(), state().chance);
    if (chance(mood.copies) == 0) {
      happen(cluster.soon);
      some_product(cluster);
    }
    const auto next =
        std::find_if(order.begin(), order.end(), [](auto& one) { return !one.first->ready[one.second].empty(); });
    if (next != order.end()) {
      state().ends_threads = true;
      run_one(*next->first, next->second);
      state().ends_threads = false;
    } else {
      const bool soon = chance(2) == 0;
      if (!happen(soon ? cluster.soon : cluster.late) && !happen(soon ? cluster.late : cluster.soon)) break;
    }
  }
  if (!state().error.empty()) return;
  stuck(cluster);
  for (GpuBlock* block : cluster.blocks) {
    state().block = block;
    check_stores_at_the_end(*block);
    int registers = 0;
    for (const Warp& warp : block->warp) registers += warp.registers * kLanes;
    if (registers > 65536 / int(block->threads.size()) / 8 * 8 * int(block->threads.size()))
      complain("its warps ask for more registers than a block has");
  }
  check_barriers_at_the_end(cluster);
}

}  // namespace

Options& options() {
  static Options only;
  return only;
}
GpuBlock& here() { return static_cast<GpuBlock&>(block()); }
int this_thread() { return here().current; }
int this_warp() { return here().current / kLanes; }
Times& known() { return here().cluster->times[here().agent(this_warp())]; }
int chance(int choices) { return int(state().chance() % unsigned(choices)); }
void park() { yield(); }
void wake(const Waiter& waiter) { waiter.block->ready[waiter.thread / kLanes].push_back(waiter.thread); }

void some_time(std::function<void()> act) {
  switch (chance(3)) {
    case 0: return act();
    case 1: return here().cluster->soon.push_back(std::move(act));
    default: return here().cluster->late.push_back(std::move(act));
  }
}

void run_grid(const Launch& launch, const std::function<void()>& body) {
  static std::vector<Memory> memory(kMostBlocks);
  options().launch = launch;
  state().error.clear();
  std::vector<int> clusters(launch.blocks / launch.cluster);
  for (size_t i = 0; i < clusters.size(); ++i) clusters[i] = int(i);
  std::shuffle(clusters.begin(), clusters.end(), state().chance);
  for (int index : clusters) {
    std::vector<std::unique_ptr<GpuBlock>> blocks;
    Cluster cluster;
    cluster.launch = launch;
    cluster.times.resize(kNobody);
    for (int i = 0; i < kNobody; ++i) cluster.times[i].of[i] = 1;
    for (int rank = 0; rank < launch.cluster; ++rank) {
      auto block = std::make_unique<GpuBlock>();
      block->rank = rank;
      block->cluster = &cluster;
      block->memory = memory[rank].begin();
      std::memset(block->memory, 0xA5, kSharedBytes);
      std::swap(block->shadow, memory[rank].shadow);
      block->shadow.reset(rank);
      block->warp.resize(launch.threads / kLanes);
      block->of_thread.resize(launch.threads);
      for (OfThread& thread : block->of_thread) std::fill_n(thread.phase, kMostBarriers, -2);
      block->descriptors.resize(launch.threads / kWarpgroupThreads);
      prepare(*block, index * launch.cluster + rank, launch.threads, body, rank * kMostThreads);
      cluster.blocks.push_back(block.get());
      blocks.push_back(std::move(block));
    }
    run_cluster(cluster);
    for (int rank = 0; rank < launch.cluster; ++rank) std::swap(blocks[rank]->shadow, memory[rank].shadow);
    if (!state().error.empty()) return;
  }
}

// -- shared memory ----------------------------------------------------------------------------------------------------

Place place(uint32_t address, int bytes, int alignment, const char* what) {
  GpuBlock& own = here();
  const uint32_t rank = address >> kRankShift, offset = (address & ((1u << kRankShift) - 1)) - kSharedWindow;
  if (rank > own.cluster->blocks.size()) complain(std::string(what) + " of a block that is not in the cluster");
  if (int64_t(offset) + bytes > own.cluster->launch.shared_bytes)
    complain(std::string(what) + " beyond the block's shared memory: " + offset_text(int(offset)));
  if (address % alignment) complain(std::string(what) + " at an odd address: " + offset_text(int(offset)));
  if (!state().error.empty()) return {&own, 0};
  return {rank ? own.cluster->blocks[rank - 1] : &own, int(offset)};
}

void shared_read(void* to, uint32_t address, int bytes, const char* what) {
  const Place at = place(address, bytes, bytes, what);
  const bool left = std::all_of(at.block->threads.begin(), at.block->threads.end(), [](auto& t) { return t.done; });
  if (left) complain(std::string(what) + " of a block that has ended");
  if (const char* reason = at.block->shadow.reading(words(at, bytes), known(), false))
    complain(std::string(what) + " " + reason + ": " + offset_text(at.offset));
  // Of another block's reads there is no record: nothing is written there again before all of the cluster meet.
  const int agent = here().agent(this_warp());
  if (at.block == &here()) at.block->shadow.was_read(this_warp(), words(at, bytes), known().of[agent]);
  std::memcpy(to, at.data(), bytes);
}

void shared_write(uint32_t address, const void* from, int bytes, const char* what) {
  const Place at = place(address, bytes, bytes, what);
  if (at.block != &here()) return complain(std::string(what) + " to another block");
  const std::string reason = at.block->shadow.writing(words(at, bytes), known(), false);
  if (!reason.empty()) complain(std::string(what) + " " + reason + ": " + offset_text(at.offset));
  const int agent = here().agent(this_warp());
  at.block->shadow.was_written(agent, words(at, bytes), known().of[agent], true);
  here().of_thread[this_thread()].unpublished.push_back(words(at, bytes));
  std::memcpy(at.data(), from, bytes);
}

void check_readable(const void* from, int64_t bytes) {
  const char* first = static_cast<const char*>(from);
  bool there = bytes == 0 || state().readable.empty();
  for (const auto& [begin, end] : state().readable) there |= first >= begin && first + bytes <= end;
  if (!there) complain("a copy reads outside its operands");
}

void copy_word(uint32_t to, const void* from, bool there) {
  const Place at = place(to, kWord, kWord, "cp.async");
  if (reinterpret_cast<uintptr_t>(from) % kWord) complain("cp.async from an odd address");
  check_readable(from, there ? kWord : 0);
  GpuBlock& own = here();
  const std::string reason = own.shadow.writing(words(at, kWord), known(), false);
  if (!reason.empty()) complain("cp.async " + reason + ": " + offset_text(at.offset));
  own.shadow.was_written(own.agent(this_warp()), words(at, kWord), kUnderWay, true);
  OfThread& mine = own.of_thread[this_thread()];
  mine.copied.push_back(words(at, kWord));
  mine.unpublished.push_back(words(at, kWord));
  const auto arrive = [data = at.data(), from, there] {
    if (there)
      std::memcpy(data, from, kWord);
    else
      std::memset(data, 0, kWord);
  };
  if (chance(2))
    arrive();
  else
    mine.copies.push_back(arrive);
}
void copies_done() {
  GpuBlock& own = here();
  OfThread& mine = own.of_thread[this_thread()];
  for (const auto& arrive : mine.copies) arrive();
  const int agent = own.agent(this_warp());
  for (const Words& range : mine.copied) own.shadow.was_written(agent, range, known().of[agent], true);
  mine.copies.clear();
  mine.copied.clear();
}

void publish() {
  OfThread& mine = here().of_thread[this_thread()];
  for (const Words& range : mine.unpublished) here().shadow.published(range);
  mine.unpublished.clear();
}

// -- meetings ---------------------------------------------------------------------------------------------------------

namespace {

// What all of these did before is past for each of them; what they do from now on is not.
void know_each_other(const std::vector<Waiter>& members) {
  Cluster& cluster = *here().cluster;
  std::vector<int> agents;
  for (const Waiter& member : members) agents.push_back(member.block->agent(member.thread / kLanes));
  std::sort(agents.begin(), agents.end());
  agents.erase(std::unique(agents.begin(), agents.end()), agents.end());
  Times all;
  for (int agent : agents) all.join(cluster.times[agent]);
  for (int agent : agents) {
    cluster.times[agent] = all;
    cluster.times[agent].of[agent] += 1;
  }
}

}  // namespace

void named_barrier(int barrier, int threads) {
  if (barrier < 0 || barrier > 15) return complain("a named barrier of number " + std::to_string(barrier));
  Meeting& meeting = here().named[barrier];
  meet(meeting, threads, "bar.sync", nullptr, [&](auto&) {
    std::vector<Waiter> members;
    for (int thread : meeting.waiting) members.push_back({&here(), thread});
    know_each_other(members);
  });
}

void cluster_barrier() {
  Cluster& cluster = *here().cluster;
  cluster.meeting.push_back({&here(), this_thread()});
  size_t all = 0;
  for (GpuBlock* block : cluster.blocks) all += block->threads.size();
  if (cluster.meeting.size() == all) {
    know_each_other(cluster.meeting);
    for (const Waiter& waiter : cluster.meeting) wake(waiter);
    cluster.meeting.clear();
  }
  park();
}

void set_registers(int registers) {
  if (registers % 8 || registers < 24 || registers > 256) complain("setmaxnreg " + std::to_string(registers));
  here().warp[this_warp()].registers = registers;
}

}  // namespace emulated
