// What is sure to come before what: vector clocks of the warps and barriers of a cluster, and for each 4 bytes of a
// block's shared memory who wrote and read them last. An access that is not sure to come after another one that it
// must come after is complained about, whether or not it went wrong this time.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace emulated {

constexpr int kMostBlocks = 8, kMostWarps = 12, kMostBarriers = 20, kAgentsOfBlock = kMostWarps + kMostBarriers;
constexpr int kNobody = kMostBlocks * kAgentsOfBlock;
constexpr uint32_t kUnderWay = ~0u;  // the time of what nobody has waited for yet
constexpr int kSharedBytes = 227 * 1024, kWord = 4, kWords = kSharedBytes / kWord;

// Of each agent, the latest moment that is known to be past.
struct Times {
  std::array<uint32_t, kNobody + 1> of{};

  void join(const Times& other) {
    for (size_t i = 0; i < of.size(); ++i) of[i] = std::max(of[i], other.of[i]);
  }
};

struct Words {
  int first, count;
};

// Of one block's shared memory.
class Shadow {
 public:
  void reset(int rank) {
    first_agent_ = rank * kAgentsOfBlock;
    for (auto& row : read_) row.assign(kWords, 0);
    writer_.assign(kWords, uint16_t(kNobody));
    written_.assign(kWords, 1);
    generic_.assign(kWords, 0);
  }

  // Why reading is wrong; nullptr if it is not. `async`: by the copy engine or a wgmma.
  const char* reading(Words words, const Times& known, bool async) const {
    uint32_t late = 0, hidden = 0, unwritten = 0;
    for (int i = words.first; i < words.first + words.count; ++i) {
      late |= written_[i] > known.of[writer_[i]];
      unwritten |= writer_[i] == kNobody;
      hidden |= generic_[i];
    }
    if (unwritten) return "reads what nobody wrote";
    if (late) return "reads what is not sure to be written yet";
    return async && hidden ? "reads by the async proxy what was written without fence.proxy.async" : nullptr;
  }
  // Why writing is wrong, as far as others' reads and writes go.
  std::string writing(Words words, const Times& known, bool async) const {
    for (int warp = 0; warp < kMostWarps; ++warp) {
      const uint32_t limit = known.of[first_agent_ + warp], *read = read_[warp].data() + words.first;
      uint32_t late = 0, running = 0;
      for (int i = 0; i < words.count; ++i) {
        late |= read[i] > limit;
        running |= read[i] == kUnderWay;
      }
      if (late)
        return std::string("writes what warp ") + std::to_string(warp) +
               (running ? " has a wgmma or bulk store reading" : " may still read");
    }
    uint32_t late = 0, hidden = 0;
    for (int i = words.first; i < words.first + words.count; ++i) {
      late |= writer_[i] != kNobody && written_[i] > known.of[writer_[i]];
      hidden |= generic_[i];
    }
    if (late) return "writes where another write is not sure to be done";
    return async && hidden ? "writes by the async proxy over ordinary stores without fence.proxy.async" : "";
  }

  void was_read(int warp, Words words, uint32_t time) {
    for (int i = words.first; i < words.first + words.count; ++i)
      if (read_[warp][i] != kUnderWay) read_[warp][i] = time;
  }
  void read_begins(int warp, Words words) {
    std::fill_n(read_[warp].begin() + words.first, words.count, kUnderWay);
  }
  void read_ended(int warp, Words words, uint32_t time) {
    std::fill_n(read_[warp].begin() + words.first, words.count, time);
  }
  void was_written(int agent, Words words, uint32_t time, bool generic) {
    std::fill_n(writer_.begin() + words.first, words.count, uint16_t(agent));
    std::fill_n(written_.begin() + words.first, words.count, time);
    std::fill_n(generic_.begin() + words.first, words.count, uint8_t(generic));
  }
  void published(Words words) { std::fill_n(generic_.begin() + words.first, words.count, uint8_t(0)); }

 private:
  int first_agent_ = 0;
  std::array<std::vector<uint32_t>, kMostWarps> read_;  // by warp of the block: when
  std::vector<uint16_t> writer_;                        // agent
  std::vector<uint32_t> written_;                       // when, in its time
  std::vector<uint8_t> generic_;                        // by an ordinary store, hidden from the async proxy so far
};

}  // namespace emulated
