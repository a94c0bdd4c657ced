// A cluster of blocks of a Hopper GPU on the CPU, all alive at once; emulation.h has the fibers and what warps do.
//
// As hostile as PTX allows: blocks and warps take turns by chance; copies and bulk stores happen in pieces, at once, at
// any moment, or not before nothing else can go on; a wgmma reads its operands at any moment until it is waited for,
// and its accumulators hold garbage until then. Order is checked besides (order.h): a race is seen when it is possible.
#pragma once

#include <deque>
#include <memory>

#include "emulation.h"
#include "order.h"

namespace emulated {

constexpr uint32_t kSharedWindow = 1024;  // address of the first byte that a block asked for
constexpr int kRankShift = 24;            // addresses in the cluster: 1 + rank above these bits
constexpr int kMostThreads = kMostWarps * kLanes, kWarpgroupThreads = 128;

struct Cluster;
struct GpuBlock;

struct Waiter {
  GpuBlock* block;
  int thread;
};

struct Barrier {
  int offset, agent;
  int expected = 0, pending = 0;
  int64_t bytes = 0;  // announced, not yet there; below 0 where they come first
  uint32_t completed = 0;
  bool ready = false;  // others may use it
  Times arriving, past;
  std::vector<Waiter> waiting;
};

// What a lane leaves to the tensor cores: its registers hold garbage meanwhile.
struct Accumulator {
  uint32_t* registers;
  int under_way = 0;
  std::vector<uint32_t> values;
};
struct Product {
  uint64_t a, b;
  int n, add;
  bool integers;
  Accumulator* d[kLanes];
  const uint32_t* metadata[kLanes];
};
struct Group {
  std::vector<Product> products;
  std::vector<Words> reads;
  bool done = false;
};
struct Warp {
  std::vector<Product> open;
  int issued[kLanes] = {};  // since the last commit
  std::deque<Group> groups;
  long long committed = 0;
  std::deque<Accumulator> accumulators[kLanes];
  bool fenced[kLanes] = {};
  int registers = 0;
};

struct Store {
  std::vector<uint8_t> data;  // once read
  std::function<void(Store&)> read, write;
  std::vector<Words> reads;
  bool is_read = false, retired = false;
};
struct OfThread {
  int phase[kMostBarriers];
  std::vector<Words> unpublished;
  std::vector<std::shared_ptr<Store>> stores;
  std::vector<std::function<void()>> copies;  // cp.async under way
  std::vector<Words> copied;                  // by them, those that are there among them
};

struct GpuBlock : Block {
  int rank = 0;
  Cluster* cluster = nullptr;
  uint8_t* memory = nullptr;  // kSharedBytes
  Shadow shadow;
  std::vector<std::unique_ptr<Barrier>> barriers;
  std::vector<Warp> warp;
  std::vector<OfThread> of_thread;
  Meeting named[16];
  std::vector<std::vector<uint64_t>> descriptors;  // by warpgroup: all that its first warp issued

  int agent(int warp_index) const { return rank * kAgentsOfBlock + warp_index; }
};

struct Launch {
  int blocks, cluster, threads, shared_bytes;
};
struct Cluster {
  Launch launch;
  std::vector<GpuBlock*> blocks;
  std::vector<Times> times;  // by agent
  std::vector<Waiter> meeting;
  std::vector<std::function<void()>> soon, late;  // of the copy engine: at any moment; when nothing else can go on
};

// -- what the kernel is (gpu.cpp) -------------------------------------------------------------------------------------

struct Options {
  int gpu_blocks = 4;  // that run at the same time
  int fault = 0;       // of the kernel, made for a test
  Launch launch{};
};
Options& options();
inline bool fault(int number) { return options().fault == number; }
GpuBlock& here();
int this_thread();
int this_warp();
Times& known();  // of this warp
// Runs all clusters; what went wrong is in state().error.
void run_grid(const Launch& launch, const std::function<void()>& body);
// Parks this thread until somebody makes it ready.
void park();
void wake(const Waiter& waiter);
int chance(int choices);
// Now, at any moment, or at last.
void some_time(std::function<void()> act);

struct Place {
  GpuBlock* block;
  int offset;
  uint8_t* data() const { return block->memory + offset; }
};
// Checks that [address, address + bytes) is there, and how it is aligned.
Place place(uint32_t address, int bytes, int alignment, const char* what);
inline Words words(const Place& at, int bytes) {
  const int first = at.offset / kWord;
  return {first, (at.offset + bytes - 1) / kWord - first + 1};
}

// -- ordinary accesses (gpu.cpp) --------------------------------------------------------------------------------------

void shared_read(void* to, uint32_t address, int bytes, const char* what);
void shared_write(uint32_t address, const void* from, int bytes, const char* what);
void copy_word(uint32_t to, const void* from, bool there);  // cp.async
void copies_done();
void publish();
void named_barrier(int barrier, int threads);
void cluster_barrier();
void set_registers(int registers);
void check_readable(const void* from, int64_t bytes);

// -- barriers in shared memory (barriers.cpp) -------------------------------------------------------------------------

void barrier_init(uint32_t address, int arrivals);
void barriers_ready();
void barrier_arrive(uint32_t address, int bytes, bool own);
void barrier_wait(uint32_t address, uint32_t parity);
Barrier& barrier_at(const Place& at, const char* what);
void bytes_came(Barrier& barrier, int bytes);
void check_barriers_at_the_end(Cluster& cluster);

// -- the copy engine (copies.cpp) -------------------------------------------------------------------------------------

// What cuTensorMapEncodeTiled was told.
struct TensorMap {
  uint8_t* data;
  int64_t columns, rows, pitch;  // elements, and bytes from row to row
  int element, box_columns, box_rows;
};
void bulk_load(uint32_t to, const void* from, int bytes, uint32_t barrier, int mask);  // mask 0: to itself
void box_load(uint32_t to, const TensorMap& map, int column, int row, uint32_t barrier, int mask);
void box_store(const TensorMap& map, int column, int row, uint32_t from);
void stores_read(int pending);
void check_stores_at_the_end(GpuBlock& block);

// -- wgmma (products.cpp) ---------------------------------------------------------------------------------------------

void wgmma_fence();
void wgmma_issue(void* d, int n, bool integers, uint64_t a, uint64_t b, const uint32_t* metadata, int add);
void wgmma_commit();
void wgmma_wait(int pending);
void some_product(Cluster& cluster);  // by chance, one that is under way
void store_matrices(uint32_t address, const uint32_t* values, int matrices);

}  // namespace emulated
