// "cp.async.bulk" and "cp.async.bulk.tensor.2d", to shared memory and back. Each copy comes in pieces to each block.
#include <algorithm>

#include "gpu.h"

namespace emulated {

namespace {

constexpr int kRow = 128, kChunk = 16;  // of the swizzle

// Chunks of 16 bytes change places in rows of 128: bits 4 to 6 of an address with bits 7 to 9.
uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

bool ended(const GpuBlock& block) {
  return std::all_of(block.threads.begin(), block.threads.end(), [](const Thread& thread) { return thread.done; });
}

struct Piece {
  GpuBlock* to;
  int offset, bytes;
  Barrier* barrier;
  std::shared_ptr<Times> known;  // where it was ordered
  std::function<void(uint8_t*)> fill;
};

void land(const Piece& piece) {
  if (ended(*piece.to)) return complain("a copy comes to a block that has ended");
  const Words range{piece.offset / kWord, piece.bytes / kWord};
  const std::string reason = piece.to->shadow.writing(range, *piece.known, true);
  if (!reason.empty())
    complain("a bulk copy to block " + std::to_string(piece.to->index) + ", shared memory + " +
             std::to_string(piece.offset) + ", " + reason);
  piece.fill(piece.to->memory + piece.offset);
  piece.to->shadow.was_written(piece.barrier->agent, range, piece.barrier->completed + 1, false);
  bytes_came(*piece.barrier, piece.bytes);
}

// `part(first, bytes)` says how bytes [first, first + bytes) of the copy are filled.
void to_blocks(uint32_t to, int bytes, int unit, uint32_t barrier, int mask, int alignment,
               const std::function<std::function<void(uint8_t*)>(int, int)>& part) {
  GpuBlock& own = here();
  const Place at = place(to, bytes, alignment, "a bulk copy"), signal = place(barrier, 8, 8, "a bulk copy's barrier");
  if (at.block != &own || signal.block != &own) return complain("a bulk copy is ordered for another block's memory");
  if (mask >> own.cluster->blocks.size()) return complain("a bulk copy to blocks that are not in the cluster");
  if (!state().error.empty()) return;
  const auto now = std::make_shared<Times>(known());
  for (GpuBlock* block : own.cluster->blocks) {
    if (mask ? !(mask >> block->rank & 1) : block != &own) continue;
    Barrier& there = barrier_at({block, signal.offset}, "a bulk copy");
    if (!there.ready) return complain("a bulk copy signals a barrier without fence.mbarrier_init");
    for (int first = 0; first < bytes;) {
      const int units = (bytes - first) / unit, size = (chance(2) ? units : 1 + chance(units)) * unit;
      some_time([=, &there] { land({block, at.offset + first, size, &there, now, part(first, size)}); });
      first += size;
    }
  }
}

// Row by row of a box: f(address of 16 bytes in shared memory, in the tensor or nullptr, bytes of them that are there).
template <class F>
void each_chunk(const TensorMap& map, int column, int row, uint32_t address, int first_row, int rows, const F& f) {
  const int row_bytes = map.box_columns * map.element;
  for (int r = first_row; r < first_row + rows; ++r)
    for (int c = 0; c < row_bytes; c += kChunk) {
      const int64_t from_row = int64_t(row) + r, byte = int64_t(column) * map.element + c;
      const int64_t there = std::clamp<int64_t>(map.columns * map.element - byte, 0, kChunk);
      const bool inside = from_row >= 0 && from_row < map.rows && byte >= 0;
      f(swizzled(address + uint32_t(r * row_bytes + c)), inside ? map.data + from_row * map.pitch + byte : nullptr,
        inside ? int(there) : 0);
    }
}

void check_map(const TensorMap& map, uint32_t address) {
  if (reinterpret_cast<uintptr_t>(&map) % 64) complain("a tensor map at an odd address");
  if (map.box_columns * map.element != kRow) complain("a box whose rows are not those of the swizzle");
  if (address % 128) complain("a box at an odd address");
  if (address % 1024) complain("a box that does not begin where the swizzle does");
}

}  // namespace

void bulk_load(uint32_t to, const void* from, int bytes, uint32_t barrier, int mask) {
  if (bytes % 16 || bytes <= 0 || reinterpret_cast<uintptr_t>(from) % 16) return complain("an odd bulk copy");
  check_readable(from, bytes);
  if (!state().error.empty()) return;
  to_blocks(to, bytes, 16, barrier, mask, 16, [=](int first, int size) {
    return [=](uint8_t* data) { std::memcpy(data, static_cast<const uint8_t*>(from) + first, size); };
  });
}

void box_load(uint32_t to, const TensorMap& map, int column, int row, uint32_t barrier, int mask) {
  check_map(map, to);
  check_readable(map.data, map.rows * map.pitch);
  if (!state().error.empty()) return;
  const TensorMap box = map;
  to_blocks(to, map.box_rows * kRow, kRow, barrier, mask, 128, [=](int first, int size) {
    return [=](uint8_t* data) {
      each_chunk(box, column, row, to, first / kRow, size / kRow, [&](uint32_t at, const uint8_t* from, int there) {
        uint8_t* const chunk = data + (int64_t(at) - to - first);
        std::memset(chunk, 0, kChunk);
        if (there) std::memcpy(chunk, from, there);
      });
    };
  });
}

void box_store(const TensorMap& map, int column, int row, uint32_t from) {
  check_map(map, from);
  const int bytes = map.box_rows * kRow;
  const Place at = place(from, bytes, 128, "a bulk store");
  GpuBlock& own = here();
  if (at.block != &own) complain("a bulk store from another block");
  if (const char* reason = own.shadow.reading(words(at, bytes), known(), true))
    complain(std::string("a bulk store ") + reason + ": shared memory + " + std::to_string(at.offset));
  own.shadow.read_begins(this_warp(), words(at, bytes));
  if (!state().error.empty()) return;
  const auto store = std::make_shared<Store>();
  store->reads = {words(at, bytes)};
  store->read = [=](Store& s) {
    s.data.assign(at.data(), at.data() + bytes);
    s.is_read = true;
  };
  store->write = [=, map = map](Store& s) {
    each_chunk(map, column, row, from, 0, map.box_rows, [&](uint32_t chunk, uint8_t* to, int there) {
      if (there) std::memcpy(to, s.data.data() + (chunk - from), there);
    });
  };
  own.of_thread[this_thread()].stores.push_back(store);
  some_time([store] {
    if (!store->is_read) store->read(*store);
    some_time([store] { store->write(*store); });
  });
}

void stores_read(int pending) {
  OfThread& mine = here().of_thread[this_thread()];
  const int done = int(mine.stores.size()) - pending;
  for (int i = 0; i < done; ++i) {
    Store& store = *mine.stores[i];
    if (store.retired) continue;
    if (!store.is_read) store.read(store);
    for (const Words& range : store.reads)
      here().shadow.read_ended(this_warp(), range, known().of[here().agent(this_warp())]);
    store.retired = true;
  }
}

void check_stores_at_the_end(GpuBlock& block) {
  for (const OfThread& thread : block.of_thread)
    for (const auto& store : thread.stores)
      if (!store->retired) complain("a block ends without waiting until its bulk stores have read its memory");
}

}  // namespace emulated
