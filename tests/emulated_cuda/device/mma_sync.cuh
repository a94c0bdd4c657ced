// In place of csrc/device/mma_sync.cuh: each instruction as PTX ISA describes it, for all lanes of a warp at once.
#pragma once

#include <cmath>

#include "cuda_runtime.h"
#include "slidesparse_gemm.h"

namespace slidesparse {

template <int Type>
struct SumOf {
  using Sum = float;
};
template <>
struct SumOf<SS_INT8> {
  using Sum = int;
};

namespace mma_sync {

template <int Type>
constexpr bool exists() {
  return true;
}

inline void copy16_or_zeros(void* to, const void* from, bool there) {
  emulated::copy_later({to, from, there ? 16 : 0, 16});
}
inline void copy16(void* to, const void* from) { copy16_or_zeros(to, from, true); }
inline void commit_copies() { emulated::close_group(); }
template <int Pending>
void wait_copies() {
  emulated::wait_groups(Pending);
}

// "ldmatrix": threads 8 i to 8 i + 7 hold the addresses of the rows of matrix i; of each, thread t gets elements
// 2 (t % 4) and one more, of 16 bits, of row t / 4.
inline void load_matrices(uint32_t (&to)[4], const void* row) {
  struct Mine {
    uint32_t* to;
    const uint8_t* row;
  } mine{to, static_cast<const uint8_t*>(row)};
  emulated::meet_warp("ldmatrix", &mine, [](const std::vector<void*>& all) {
    const auto lane = [&](int i) { return *static_cast<Mine*>(all[i]); };
    for (int matrix = 0; matrix < 4; ++matrix) {
      unsigned banks = 0;  // of 16 bytes
      for (int r = 0; r < 8; ++r) {
        const uintptr_t address = reinterpret_cast<uintptr_t>(lane(8 * matrix + r).row);
        if (address % 16) emulated::complain("ldmatrix of an odd address");
        emulated::state().conflicts += banks >> (address / 16 % 8) & 1;
        banks |= 1u << (address / 16 % 8);
        for (int c = 0; c < 4; ++c) std::memcpy(lane(r * 4 + c).to + matrix, lane(8 * matrix + r).row + c * 4, 4);
      }
      emulated::state().wavefronts += 1;
    }
  });
}

// "movmatrix .trans": thread t holds elements [t / 4][2 (t % 4)] and one more, and gets those of the transpose.
inline uint32_t transposed(uint32_t two) {
  uint32_t result = 0;
  std::pair<uint32_t, uint32_t*> mine{two, &result};
  emulated::meet_warp("movmatrix", &mine, [](const std::vector<void*>& all) {
    const auto lane = [&](int i) { return static_cast<std::pair<uint32_t, uint32_t*>*>(all[i]); };
    const auto element = [&](int row, int column) {
      return lane(row * 4 + column / 2)->first >> 16 * (column % 2) & 0xFFFF;
    };
    for (int t = 0; t < 32; ++t)
      *lane(t)->second = element(t % 4 * 2, t / 4) | element(t % 4 * 2 + 1, t / 4) << 16;
  });
  return result;
}

inline double decoded(uint8_t byte, int type) {
  if (type == SS_INT8) return int8_t(byte);
  const int exponent = byte >> 3 & 15, mantissa = byte & 7;
  if (exponent == 15 && mantissa == 7) return NAN;
  const double size = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
  return byte & 0x80 ? -size : size;
}

template <int Type, bool Sparse>
struct Instruction;

// "mma.sp.m16n8k64" of 8-bit types. Groups g = t / 4 and h = t % 4 of thread t:
//   a  byte i of 16: kept value (h * 4 + i % 4) + 16 for i >= 8, of row g, + 8 for i in 4 to 7 and 12 to 15
//   b  byte i of 16: k = h * 4 + i % 4 + 16 * (i / 4), column g
//   c  value i of 4: row g, + 8 for i >= 2; column h * 2 + i % 2
// Metadata, selector 0: h = 0 and 1 hold columns 0 to 31 of rows g and g + 8, h = 2 and 3 columns 32 to 63 of the same;
// 4 bits for 4 columns, the place of the first kept value in the lower 2.
template <int Type>
struct Instruction<Type, true> {
  using Sum = typename SumOf<Type>::Sum;

  static void issue(Sum (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {
    struct Mine {
      Sum* d;
      const uint32_t *a, *b;
      uint32_t metadata;
    } mine{d, a, b, metadata};
    emulated::meet_warp("mma.sp", &mine, [](const std::vector<void*>& all) {
      static double wide[16][64], tokens[64][8];
      std::fill(&wide[0][0], &wide[0][0] + 16 * 64, 0.0);
      for (int t = 0; t < 32; ++t) {
        const Mine& lane = *static_cast<Mine*>(all[t]);
        const int g = t / 4, h = t % 4;
        for (int i = 0; i < 16; ++i)
          tokens[h * 4 + i % 4 + 16 * (i / 4)][g] = decoded(uint8_t(lane.b[i / 4] >> 8 * (i % 4)), Type);
        for (int i = 0; i < 16; ++i) {
          const int row = g + (i / 4 % 2) * 8, kept = h * 4 + i % 4 + (i >= 8) * 16, column = kept / 2 * 4;
          const Mine& holder = *static_cast<Mine*>(all[g * 4 + (column >= 32) * 2 + (row >= 8)]);
          const uint32_t pair = holder.metadata >> (column % 32) & 15;
          if ((pair & 3) >= pair >> 2) emulated::complain("metadata that does not ascend");
          wide[row][column + (kept % 2 ? pair >> 2 : pair & 3)] = decoded(uint8_t(lane.a[i / 4] >> 8 * (i % 4)), Type);
        }
      }
      for (int t = 0; t < 32; ++t)
        for (int i = 0; i < 4; ++i) {
          double sum = 0;
          for (int k = 0; k < 64; ++k) sum += wide[t / 4 + i / 2 * 8][k] * tokens[k][t % 4 * 2 + i % 2];
          Sum& c = static_cast<Mine*>(all[t])->d[i];
          c = Sum(c + sum);
        }
    });
  }
};

}  // namespace mma_sync

}  // namespace slidesparse
