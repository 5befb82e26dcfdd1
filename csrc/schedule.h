// How the work is cut: tasks (layer, sample, begin, end) over positions, fixed by the shapes alone,
// so that no result depends on how many threads there are.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <tuple>
#include <vector>

#include "common.h"

namespace lwkd {

constexpr int64_t kTile = 4096;    // positions of one task: 16 KiB of float32 map, half of L1
constexpr int64_t kGrain = 32768;  // elements below which a second thread costs more than it gives

// The tasks of one operand, all of one size but the last tile of a sample.
struct Block {
  int64_t samples, positions, tiles, cost;  // cost of one task, in elements
  int64_t first;                            // cost of all blocks before this one

  int64_t tasks() const { return samples * tiles; }
};

inline Block make_block(int64_t samples, int64_t channels, int64_t positions) {
  Block b{};
  b.samples = samples;
  b.positions = positions;
  b.tiles = (positions + kTile - 1) / kTile;
  b.cost = std::max<int64_t>(1, (channels + 1) * std::min(positions, kTile));
  return b;
}

// A sample is one task, whatever its size.
inline Block whole_samples(int64_t samples, int64_t cost) {
  return {samples, kTile, 1, std::max<int64_t>(1, cost), 0};
}

// Sets every `first` and returns the cost of all.
inline int64_t lay_out(std::vector<Block>& blocks) {
  int64_t total = 0;
  for (Block& b : blocks) {
    b.first = total;
    total += b.tasks() * b.cost;
  }
  return total;
}

// Calls run(block, sample, begin, end) for every task whose cost starts in [begin, end).
template <typename Run>
void run_tasks(const std::vector<Block>& blocks, int64_t begin, int64_t end, const Run& run) {
  auto at = std::upper_bound(blocks.begin(), blocks.end(), begin,
                             [](int64_t value, const Block& b) { return value < b.first; });
  for (size_t i = at == blocks.begin() ? 0 : at - blocks.begin() - 1; i < blocks.size(); ++i) {
    const Block& b = blocks[i];
    if (b.first >= end) break;
    if (b.tasks() == 0) continue;
    const int64_t from = begin <= b.first ? 0 : (begin - b.first + b.cost - 1) / b.cost;
    const int64_t to = std::min(b.tasks(), (end - b.first + b.cost - 1) / b.cost);
    for (int64_t task = from; task < to; ++task) {
      const int64_t first = task % b.tiles * kTile;
      run(static_cast<int64_t>(i), task / b.tiles, first, std::min(first + kTile, b.positions));
    }
  }
}

// Runs every task, on as many threads as torch has.
template <typename Run>
void parallel_tasks(std::vector<Block>& blocks, const Run& run) {
  torch::stable::parallel_for(0, lay_out(blocks), kGrain, [&](int64_t begin, int64_t end) {
    run_tasks(blocks, begin, end, run);
  });
}

inline std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t>> plan(
    const std::vector<std::array<int64_t, 3>>& shapes) {
  std::vector<Block> blocks;
  for (const auto& [n, c, positions] : shapes) blocks.push_back(make_block(n, c, positions));
  std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t>> tasks;
  const int64_t total = lay_out(blocks);
  run_tasks(blocks, 0, total, [&](int64_t layer, int64_t n, int64_t begin, int64_t end) {
    tasks.emplace_back(layer, n, begin, end);
  });
  return tasks;
}

}  // namespace lwkd
