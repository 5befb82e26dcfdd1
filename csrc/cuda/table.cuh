// What a launch works on: a table of items that is itself a kernel parameter, so that nothing is
// copied to the device and a captured graph keeps it. No torch here.
#pragma once

#include <algorithm>
#include <cstddef>
#include <type_traits>
#include <vector>

#include "common.cuh"

namespace lwkd::cuda {

template <typename Item, int K>
struct Table {
  int64_t blocks;
  int32_t count;
  Item item[K];
};

// The item that a block belongs to.
template <typename Item, int K>
__device__ __forceinline__ int find(const Table<Item, K>& table, int64_t block) {
  int low = 0, high = table.count;
#pragma unroll 1
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.item[middle].first <= block)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// --- on the host
// ------------------------------------------------------------------------------------

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Items of a launch: as many as a kernel parameter holds (32,764 bytes), and a short table for the
// usual few layers, since the whole table travels with every launch.
#ifdef LWKD_EMULATE
constexpr int kFewItems = 2, kManyItems = 6;
#else
constexpr int kFewItems = 32, kManyItems = 128;
#endif
constexpr int64_t kTableBytes = 32764 - 64;

// Splits `items` into tables and calls run(table, first item) for each. SHORT: there are
// kernels for the short table.
template <bool SHORT, typename Item, typename Run>
void with_tables(const std::vector<Item>& items, const Run& run) {
  const auto fill = [&]<int K>(std::integral_constant<int, K>, size_t from, size_t count) {
    static_assert(sizeof(Table<Item, K>) <= kTableBytes, "a kernel parameter ends at 32,764 bytes");
    Table<Item, K> table;
    table.count = static_cast<int32_t>(count);
    std::copy_n(items.begin() + from, count, table.item);
    run(table, from);
  };
  constexpr int kMost = std::min<int64_t>(kManyItems, (kTableBytes - 64) / sizeof(Item));
  for (size_t from = 0; from < items.size(); from += kMost) {
    const size_t count = std::min<size_t>(kMost, items.size() - from);
    if constexpr (SHORT) {
      if (count <= kFewItems) {
        fill(std::integral_constant<int, kFewItems>{}, from, count);
        continue;
      }
    }
    fill(std::integral_constant<int, kMost>{}, from, count);
  }
}

// Numbers the blocks of a table and returns how many there are.
template <typename Item, int K>
int64_t number_blocks(Table<Item, K>& table, const int64_t* blocks) {
  int64_t first = 0;
  for (int i = 0; i < table.count; ++i) {
    table.item[i].first = first;
    first += blocks[i];
  }
  return table.blocks = first;
}

// Bytes handed out of one allocation.
struct Scratch {
  int64_t bytes = 0;
  char* data = nullptr;

  int64_t reserve(int64_t count, int64_t element) {
    const int64_t at = bytes;
    bytes += ceil_div(count * element, 16) * 16;
    return at;
  }
  template <typename T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(data + offset);
  }
};

}  // namespace lwkd::cuda
