// "wgmma.mma_async.sp" of 8-bit types and "stmatrix", as PTX ISA describes them. Each warp makes its 16 rows.
#include <cmath>

#include "gpu.h"

namespace emulated {

namespace {

constexpr uint32_t kGarbage = 0xFFBADBAD;  // NaN
constexpr int kRows = 16, kStep = 64, kMostN = 256;

float decoded(uint8_t byte, bool integers) {
  if (integers) return int8_t(byte);
  const int exponent = byte >> 3 & 15, mantissa = byte & 7;
  if (exponent == 15 && mantissa == 7) return NAN;
  const float size = exponent ? std::ldexp(float(8 + mantissa), exponent - 10) : std::ldexp(float(mantissa), -9);
  return byte & 0x80 ? -size : size;
}
const float* table(bool integers) {
  static const auto tables = [] {
    std::array<std::array<float, 256>, 2> both;
    for (int i = 0; i < 2; ++i)
      for (int byte = 0; byte < 256; ++byte) both[i][byte] = decoded(uint8_t(byte), i);
    return both;
  }();
  return tables[integers].data();
}

// "Matrix Descriptor Format", K-major: bits 0 to 13 start / 16, 32 to 45 distance of groups of 8 rows / 16, 49 to 51
// base offset, 62 and 63 swizzle: 1, 2, 3 for rows of 128, 64, 32 bytes.
struct Descriptor {
  uint32_t start, stride, row_bytes;

  explicit Descriptor(uint64_t bits)
      : start(uint32_t(bits & 0x3FFF) << 4),
        stride(uint32_t(bits >> 32 & 0x3FFF) << 4),
        row_bytes(256u >> (bits >> 62)) {
    if (bits >> 62 == 0) complain("a descriptor without swizzle");
    if (bits >> 49 & 7 || begin() % (8 * row_bytes)) complain("a descriptor whose rows are not aligned to its swizzle");
    if (stride % (8 * row_bytes)) complain("a descriptor whose groups of 8 rows are not aligned to its swizzle");
  }
  // Of row 0, whatever column it starts from.
  uint32_t begin() const { return start - start % row_bytes; }
  // 16 bytes at 16 * chunk of a row: bits 4 and up with as many from bit 7.
  uint32_t address(uint32_t row, uint32_t chunk) const {
    const uint32_t plain = start + row / 8 * stride + row % 8 * row_bytes + chunk * 16;
    return plain ^ (plain >> 7 & (row_bytes / 16 - 1)) << 4;
  }
  Words words(int first_row, int rows) const {
    const Place at = place(begin() + first_row / 8 * stride, rows / 8 * int(stride), 16, "wgmma");
    return emulated::words(at, rows / 8 * int(stride));
  }
};

void multiply(GpuBlock& block, int warp, Product& p) {
  alignas(64) static float wide[kStep][kRows], sums[kMostN][kRows];
  const float* const value = table(p.integers);
  const auto bytes = [&](uint32_t address) { return block.memory + (address - kSharedWindow); };
  // "Sparse matrix storage", m64nNk64 of 8-bit types: of a quad of lanes the even ones hold rows 0 to 7, the odd ones 8
  // to 15 of the warp's 16; the first two columns 0 to 31, the others 32 to 63. 4 bits for 4 columns: the places of the
  // two values that are kept, the first one's in the lower 2.
  std::memset(wide, 0, sizeof wide);
  const Descriptor a(p.a), b(p.b);
  for (int row = 0; row < kRows; ++row) {
    uint8_t kept[kStep / 2];
    for (int chunk = 0; chunk < 2; ++chunk)
      std::memcpy(kept + chunk * 16, bytes(a.address(warp % 4 * kRows + row, chunk)), 16);
    for (int half = 0; half < 2; ++half) {
      const uint32_t metadata = *p.metadata[row % 8 * 4 + half * 2 + row / 8];
      for (int window = 0; window < 8; ++window) {
        const int places = metadata >> 4 * window & 15, column = half * 32 + window * 4;
        if ((places & 3) >= places >> 2) complain("metadata that does not ascend");
        wide[column + (places & 3)][row] = value[kept[column / 2]];
        wide[column + (places >> 2)][row] = value[kept[column / 2 + 1]];
      }
    }
  }
  // INT8: below 2^24 after 32 products, so float holds these sums.
  for (int n = 0; n < p.n; ++n) {
    alignas(64) float sum[kRows] = {};
    for (int chunk = 0; chunk < kStep / 16; ++chunk) {
      const uint8_t* const token = bytes(b.address(n, chunk));
      for (int i = 0; i < 16; ++i) {
        const float x = value[token[i]];
        const float* const weights = wide[chunk * 16 + i];
        for (int row = 0; row < kRows; ++row) sum[row] += weights[row] * x;
      }
    }
    std::memcpy(sums[n], sum, sizeof sum);
  }
  // Lane 4 g + h has rows g and g + 8, columns 2 h and one more of every 8.
  for (int lane = 0; lane < kLanes; ++lane) {
    uint32_t* const d = p.d[lane]->values.data();
    for (int i = 0; i < p.n / 2; ++i) {
      const float sum = sums[i / 4 * 8 + lane % 4 * 2 + i % 2][lane / 4 + i / 2 % 2 * 8];
      if (p.integers) {
        d[i] = (p.add ? d[i] : 0) + uint32_t(int(sum));
      } else {
        float before = 0;
        if (p.add) std::memcpy(&before, &d[i], 4);
        before += sum;
        std::memcpy(&d[i], &before, 4);
      }
    }
  }
}

void make(GpuBlock& block, int warp, Group& group) {
  if (group.done) return;
  state().block = &block;
  for (Product& product : group.products) multiply(block, warp, product);
  group.done = true;
}

// Its sums are in their registers from here on, unless a later group has them.
void retire(GpuBlock& block, int warp_index) {
  Warp& warp = block.warp[warp_index];
  Group& group = warp.groups.front();
  make(block, warp_index, group);
  for (const Product& product : group.products)
    for (int lane = 0; lane < kLanes; ++lane) {
      Accumulator& d = *product.d[lane];
      if (--d.under_way > 0) continue;
      for (int i = 0; i < product.n / 2; ++i)
        if (d.registers[i] != kGarbage) complain("a sum is touched while wgmma works on it");
      std::memcpy(d.registers, d.values.data(), d.values.size() * 4);
      warp.fenced[lane] = false;
    }
  const int agent = block.agent(warp_index);
  for (const Words& range : group.reads)
    block.shadow.read_ended(warp_index, range, block.cluster->times[agent].of[agent]);
  warp.groups.pop_front();
}

// What all lanes ordered is one order: complains where they differ, and where warps of a warpgroup do.
void order(Warp& warp) {
  GpuBlock& own = here();
  const std::vector<Product>& open = warp.open;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (warp.issued[lane] != int(open.size())) return complain("lanes that issue another number of wgmmas");
    warp.issued[lane] = 0;
  }
  Group group;
  std::vector<std::pair<uint64_t, bool>> seen;
  const auto reads = [&](uint64_t bits, bool is_a, int n) {
    const Descriptor descriptor(bits);
    const auto key = std::make_pair(uint64_t(descriptor.begin()), is_a);
    if (std::find(seen.begin(), seen.end(), key) != seen.end() || !state().error.empty()) return;
    seen.push_back(key);
    const Words range = is_a ? descriptor.words(this_warp() % 4 * kRows, kRows) : descriptor.words(0, n);
    if (const char* reason = own.shadow.reading(range, known(), true))
      complain(std::string("wgmma ") + reason + ": shared memory + " + std::to_string(range.first * kWord));
    own.shadow.read_begins(this_warp(), range);
    group.reads.push_back(range);
  };
  auto& of_all = own.descriptors[this_thread() / kWarpgroupThreads];
  for (const Product& product : open) {
    reads(product.a, true, product.n);
    reads(product.b, false, product.n);
    for (uint64_t bits : {product.a, product.b, uint64_t(product.add != 0)}) {
      if (warp.committed == (long long)of_all.size())
        of_all.push_back(bits);
      else if (of_all[warp.committed] != bits)
        complain("warps of a warpgroup issue different wgmmas");
      warp.committed += 1;
    }
  }
  group.products = std::move(warp.open);
  warp.open.clear();
  warp.groups.push_back(std::move(group));
  if (state().error.empty() && chance(3) == 0)
    for (Group& one : warp.groups) make(own, this_warp(), one);
}

}  // namespace

void wgmma_fence() { here().warp[this_warp()].fenced[this_thread() % kLanes] = true; }

void wgmma_issue(void* registers, int n, bool integers, uint64_t a, uint64_t b, const uint32_t* metadata, int add) {
  Warp& warp = here().warp[this_warp()];
  const int lane = this_thread() % kLanes, index = warp.issued[lane]++;
  auto& all = warp.accumulators[lane];
  auto d = std::find_if(all.begin(), all.end(), [&](const Accumulator& one) { return one.registers == registers; });
  if (d == all.end()) d = all.insert(all.end(), Accumulator{static_cast<uint32_t*>(registers), 0, {}});
  if (d->under_way++ == 0) {
    if (!warp.fenced[lane]) complain("wgmma without wgmma.fence after its sums were in reach");
    d->values.assign(d->registers, d->registers + n / 2);
    std::fill_n(d->registers, n / 2, kGarbage);
  }
  if (index == int(warp.open.size())) warp.open.push_back({a, b, n, add, integers, {}, {}});
  Product& product = warp.open[index];
  if (product.a != a || product.b != b || !product.add != !add) complain("lanes that issue different wgmmas");
  product.d[lane] = &*d;
  product.metadata[lane] = metadata;
}

void wgmma_commit() {
  meet_warp("wgmma.commit_group", nullptr, [](auto&) { order(here().warp[this_warp()]); });
}

void wgmma_wait(int pending) {
  Warp& warp = here().warp[this_warp()];
  while (int(warp.groups.size()) > pending && state().error.empty()) retire(here(), this_warp());
}

void some_product(Cluster& cluster) {
  GpuBlock& block = *cluster.blocks[chance(int(cluster.blocks.size()))];
  const int warp = chance(int(block.warp.size()));
  for (Group& group : block.warp[warp].groups)
    if (!group.done) return make(block, warp, group);
}

// "stmatrix .trans": lanes 8 i to 8 i + 7 name the rows of matrix i, 16 bytes each; lane 4 g + h brings elements g of
// rows 2 h and 2 h + 1.
void store_matrices(uint32_t address, const uint32_t* values, int matrices) {
  struct Mine {
    uint32_t address;
    const uint32_t* values;
  } mine{address, values};
  meet_warp("stmatrix", &mine, [matrices](const std::vector<void*>& all) {
    const auto lane = [&](int i) { return *static_cast<Mine*>(all[i]); };
    const int last = here().current;
    for (int matrix = 0; matrix < matrices; ++matrix)
      for (int row = 0; row < 8; ++row) {
        uint16_t elements[8];
        for (int g = 0; g < 8; ++g) elements[g] = uint16_t(lane(g * 4 + row / 2).values[matrix] >> 16 * (row % 2));
        here().current = last / kLanes * kLanes + matrix * 8 + row;  // whose store it is
        shared_write(lane(matrix * 8 + row).address, elements, 16, "stmatrix");
      }
    here().current = last;
  });
}

}  // namespace emulated
