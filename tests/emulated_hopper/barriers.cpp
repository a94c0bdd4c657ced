// "mbarrier": a phase ends with its last arrival, once all bytes that were announced have come. Arrivals that come when
// none is missing, bytes too many, a phase passed over, are complained about.
#include "gpu.h"

namespace emulated {

namespace {

std::string name(const Barrier& barrier) { return "barrier at shared memory + " + std::to_string(barrier.offset); }

void ends_if_complete(Barrier& barrier) {
  if (barrier.pending > 0) return;
  if (barrier.bytes < 0) complain("more bytes come to the " + name(barrier) + " than were announced");
  if (barrier.bytes != 0) return;
  barrier.completed += 1;
  barrier.pending = barrier.expected;
  barrier.past = barrier.arriving;
  barrier.past.of[barrier.agent] = barrier.completed;
  barrier.arriving = Times{};
  for (const Waiter& waiter : barrier.waiting) wake(waiter);
  barrier.waiting.clear();
}

}  // namespace

Barrier& barrier_at(const Place& at, const char* what) {
  static Barrier none;
  for (const auto& barrier : at.block->barriers)
    if (barrier->offset == at.offset) {
      if (!barrier->ready && at.block != &here()) complain(std::string(what) + ": no fence.mbarrier_init");
      return *barrier;
    }
  complain(std::string(what) + " at shared memory + " + std::to_string(at.offset) + ", where no barrier is");
  return none;
}

void barrier_init(uint32_t address, int arrivals) {
  const Place at = place(address, 8, 8, "mbarrier.init");
  GpuBlock& own = here();
  if (arrivals < 1) complain("mbarrier.init of no arrivals");
  if (own.barriers.size() == kMostBarriers) return complain("more barriers than are emulated");
  for (const auto& other : own.barriers)
    if (other->offset == at.offset) complain("mbarrier.init of a barrier");
  auto barrier = std::make_unique<Barrier>();
  barrier->offset = at.offset;
  barrier->agent = own.agent(kMostWarps + int(own.barriers.size()));
  barrier->expected = barrier->pending = arrivals;
  own.barriers.push_back(std::move(barrier));
}
void barriers_ready() {
  for (auto& barrier : here().barriers) barrier->ready = true;
}

void barrier_arrive(uint32_t address, int bytes, bool own) {
  const Place at = place(address, 8, 8, "mbarrier.arrive");
  if (own && at.block != &here()) complain("mbarrier.arrive.expect_tx in another block");
  if (at.block->threads.front().done) complain("mbarrier.arrive in a block that has ended");
  Barrier& barrier = barrier_at(at, "mbarrier.arrive");
  barrier.bytes += bytes;
  if (barrier.bytes >= 1 << 20) complain("more than 2^20 - 1 bytes are announced to the " + name(barrier));
  if (barrier.pending == 0) return complain("an arrival too many at the " + name(barrier));
  barrier.arriving.join(known());
  known().of[here().agent(this_warp())] += 1;
  barrier.pending -= 1;
  ends_if_complete(barrier);
}

void bytes_came(Barrier& barrier, int bytes) {
  barrier.bytes -= bytes;
  if (barrier.bytes <= -(1 << 20)) complain("more than 2^20 - 1 bytes come to the " + name(barrier));
  ends_if_complete(barrier);
}

void barrier_wait(uint32_t address, uint32_t parity) {
  const Place at = place(address, 8, 8, "mbarrier.try_wait");
  GpuBlock& own = here();
  if (at.block != &own) return complain("mbarrier.try_wait in another block");
  Barrier& barrier = barrier_at(at, "mbarrier.try_wait");
  if (parity > 1) complain("a parity of " + std::to_string(parity));
  while ((barrier.completed & 1) == parity) {
    if (!state().error.empty()) return park();
    barrier.waiting.push_back({&own, this_thread()});
    park();
  }
  // Parity tells only one phase from the next: a thread must pass all of them.
  const int passed = int(barrier.completed) - 1;
  int& last = own.of_thread[this_thread()].phase[barrier.agent % kAgentsOfBlock - kMostWarps];
  const int due = last == -2 ? int(parity == 0) - 1 : last + 1;
  if (passed != due)
    complain("passes the " + name(barrier) + " in phase " + std::to_string(passed) + " instead of " +
             std::to_string(due));
  last = passed;
  known().join(barrier.past);
}

void check_barriers_at_the_end(Cluster& cluster) {
  for (GpuBlock* block : cluster.blocks)
    for (const auto& barrier : block->barriers)
      if (barrier->pending != barrier->expected || barrier->bytes != 0)
        complain("the " + name(*barrier) + " ends within a phase");
}

}  // namespace emulated
