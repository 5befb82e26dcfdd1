// How a call of the attention kind becomes launches, and where its scratch goes. No torch here:
// tests/cuda/emulation runs it.
//
// A launcher offers allocate(bytes), clear(pointer, bytes) and
// launch(kernel, blocks, threads, shared bytes, arguments...).
#pragma once

#include <vector>

#include "attention_cut.cuh"
#include "attention_kernels.cuh"

namespace lwkd::cuda {

struct LayerViews {
  View side[2];
  int64_t space[3];
  Mask mask;

  int64_t cells() const { return space[0] * space[1] * space[2]; }
};

// One activation whose gradient is wanted.
struct GradientViews {
  View x, dx;
  View prefix;  // dropped tokens of dx, c = 0 where there are none
  const void *own, *other;
  int64_t space[3];
  Mask mask;
  const void* grad;
  int64_t grad_stride;
  double weight;

  int64_t cells() const { return space[0] * space[1] * space[2]; }
};

struct Options {
  double p;
  bool js;
  double beta;
  bool mean;
};

// --- launching -----------------------------------------------------------------------------------

// Items of a launch: as many as a kernel parameter holds (32,764 bytes), and a short table for the
// usual few layers, since the whole table travels with every launch.
#ifdef LWKD_EMULATE
constexpr int kFewItems = 2, kManyItems = 6;
#else
constexpr int kFewItems = 32, kManyItems = 128;
#endif
constexpr int64_t kTableBytes = 32764 - 64;

template <typename Run>
void with_power(double p, const Run& run) {
  if (p == 2)
    run(Two{});
  else if (p == 1)
    run(One{});
  else
    run(Any{p});
}

template <typename Run>
void with_bool(bool value, const Run& run) {
  if (value)
    run(std::true_type{});
  else
    run(std::false_type{});
}

// Splits `items` into tables and calls run(table, first item) for each. The short table serves what
// people train with, calls that compute in float.
template <typename A, typename Item, typename Run>
void with_tables(const std::vector<Item>& items, const Run& run) {
  const auto fill = [&]<int K>(std::integral_constant<int, K>, size_t from, size_t count) {
    static_assert(sizeof(Table<Item, K>) <= kTableBytes, "a kernel parameter ends at 32,764 bytes");
    Table<Item, K> table;
    table.count = static_cast<int32_t>(count);
    std::copy_n(items.begin() + from, count, table.item);
    run(table, from);
  };
  for (size_t from = 0; from < items.size(); from += kManyItems) {
    const size_t count = std::min<size_t>(kManyItems, items.size() - from);
    if constexpr (sizeof(A) == 4) {
      if (count <= kFewItems) {
        fill(std::integral_constant<int, kFewItems>{}, from, count);
        continue;
      }
    }
    fill(std::integral_constant<int, kManyItems>{}, from, count);
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

constexpr int64_t kMapShared[2] = {kThreads * 8 * 4, kThreads * 2 * 8};  // float, double

// Threads of a sample's team, and of a block of teams.
inline int32_t team_of(int64_t cells, int threads) { return cells <= 256 ? 32 : threads; }
inline int block_of(int64_t most_cells) { return most_cells >= 8192 ? kDistanceThreads : kThreads; }
inline int64_t teams_shared(int threads) { return threads / 32 * 3 * 8; }

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

// --- forward -------------------------------------------------------------------------------------

template <typename A, typename Launcher>
void launch_maps(Launcher& gpu, const std::vector<MapItem>& items, const int64_t* blocks,
                 double p, int32_t* done, int layers) {
  with_tables<A>(items, [&](auto& table, size_t from) {
    const int64_t count = number_blocks(table, blocks + from);
    with_power(p, [&](auto power) {
      gpu.launch(maps_kernel<A, decltype(power), sizeof(table.item) / sizeof(MapItem)>,
                 std::max<int64_t>(count, 1), kThreads, kMapShared[sizeof(A) == 8], table, power,
                 from == 0 ? done : nullptr, layers);
    });
  });
}

// Writes every map, then the distances: [L] of the mean, or [L, N].
template <typename A, typename Launcher>
void forward(Launcher& gpu, const std::vector<LayerViews>& layers, A* maps, A* out,
             const Options& options) {
  const int64_t length = layers.size(), samples = layers[0].side[0].n;
  if (samples == 0) return gpu.clear(out, options.mean ? length * sizeof(A) : 0);
  std::vector<MapItem> items(2 * length);
  std::vector<int64_t> blocks(2 * length), raw(2 * length, -1);
  std::vector<DistanceItem> distances(length);
  Scratch scratch;
  const int64_t each = options.mean ? scratch.reserve(length * samples, sizeof(double)) : 0;
  const int64_t done = options.mean ? scratch.reserve(length, sizeof(int32_t)) : 0;
  int64_t most_cells = 0;
  for (int64_t l = 0; l < length; ++l) {
    const LayerViews& layer = layers[l];
    const bool twins = same_layout(layer.side[0], layer.side[1]);
    const bool packs[2] = {can_pack<A>(layer.side[0]), can_pack<A>(layer.side[1])};
    most_cells = std::max(most_cells, layer.cells());
    for (int side = 0; side < 2; ++side) {
      const View& v = layer.side[side];
      // Operands of one layout are added up in one order: equal ones must be at distance 0.
      const bool packed = twins ? packs[0] && packs[1] : packs[side];
      MapItem& item = items[2 * l + side];
      blocks[2 * l + side] = plan_map<A>(item, v, packed, true);
      item.out = maps;
      maps += samples * layer.cells();
      const bool pooled = !std::equal(v.size, v.size + 3, layer.space);
      if (pooled || item.cut.splits > 1)
        raw[2 * l + side] = scratch.reserve(item.cut.splits * samples * v.positions(), sizeof(A));
    }
  }
  scratch.data = static_cast<char*>(gpu.allocate(scratch.bytes));
  const int threads = block_of(most_cells);
  std::vector<int64_t> distance_blocks(length);
  for (int64_t l = 0; l < length; ++l) {
    const LayerViews& layer = layers[l];
    DistanceItem& d = distances[l] = {};
    d.cells = layer.cells();
    d.mask = layer.mask;
    d.team = team_of(d.cells, threads);
    std::copy_n(layer.space, 3, d.space);
    for (int side = 0; side < 2; ++side) {
      MapItem& item = items[2 * l + side];
      d.side[side].map = item.out;
      d.side[side].splits = item.cut.splits;
      std::copy_n(layer.side[side].size, 3, d.side[side].size);
      if (raw[2 * l + side] >= 0)
        d.side[side].raw = item.out = scratch.at<void>(raw[2 * l + side]);
    }
    d.blocks = static_cast<int32_t>(ceil_div(samples, threads / d.team));
    distance_blocks[l] = d.blocks;
    d.out = out + (options.mean ? l : l * samples);
    if (options.mean) {
      d.each = scratch.at<double>(each) + l * samples;
      d.done = scratch.at<int32_t>(done) + l;
    }
  }
  launch_maps<A>(gpu, items, blocks.data(), options.p,
                 options.mean ? scratch.at<int32_t>(done) : nullptr, static_cast<int>(length));
  with_tables<A>(distances, [&](auto& table, size_t from) {
    const int64_t count = number_blocks(table, distance_blocks.data() + from);
    with_bool(options.js, [&](auto js) {
      gpu.launch(distance_kernel<A, js.value, sizeof(table.item) / sizeof(DistanceItem)>, count,
                 threads, teams_shared(threads), table, samples, options.beta);
    });
  });
}

// Writes the map [N, positions] of every view.
template <typename A, typename Launcher>
void maps_alone(Launcher& gpu, const std::vector<View>& views, const std::vector<void*>& out,
                double p) {
  std::vector<MapItem> items(views.size());
  std::vector<int64_t> blocks(views.size());
  for (size_t i = 0; i < views.size(); ++i) {
    blocks[i] = plan_map<A>(items[i], views[i], can_pack<A>(views[i]), false);
    items[i].out = out[i];
  }
  launch_maps<A>(gpu, items, blocks.data(), p, nullptr, 0);
}

// --- backward ------------------------------------------------------------------------------------

// `samples` for an empty list of anything is 0: nothing is launched then.
template <typename A, typename Launcher>
void backward(Launcher& gpu, const std::vector<GradientViews>& jobs, const Options& options) {
  const int64_t samples = jobs.empty() ? 0 : jobs[0].x.n;
  if (samples == 0) return;
  std::vector<SlopeItem> slopes(jobs.size());
  std::vector<SpreadItem> spreads;
  std::vector<int64_t> slope_blocks, spread_blocks, offsets;
  Scratch scratch;
  int64_t most_cells = 0;
  bool pooled = false;
  for (const GradientViews& job : jobs) {
    pooled = pooled || job.cells() != job.x.positions();
    offsets.push_back(scratch.reserve(samples * job.x.positions(), sizeof(A)));
    most_cells = std::max({most_cells, job.cells(), job.x.positions()});
  }
  scratch.data = static_cast<char*>(gpu.allocate(scratch.bytes));
  const int threads = block_of(most_cells);
  for (size_t i = 0; i < jobs.size(); ++i) {
    const GradientViews& job = jobs[i];
    SlopeItem& c = slopes[i] = {};
    c.own = job.own;
    c.other = job.other;
    c.out = scratch.at<void>(offsets[i]);
    std::copy_n(job.x.size, 3, c.size);
    std::copy_n(job.space, 3, c.space);
    c.positions = job.x.positions();
    c.cells = job.cells();
    c.mask = job.mask;
    c.grad = job.grad;
    c.grad_stride = job.grad_stride;
    c.weight = job.weight;
    c.team = team_of(c.positions, threads);
    slope_blocks.push_back(ceil_div(samples, threads / c.team));
    SpreadItem item;
    const int64_t blocks = plan_spread<A>(item, job.x, job.dx);
    item.slope = c.out;
    if (blocks > 0) spreads.push_back(item), spread_blocks.push_back(blocks);
    if (job.prefix.c == 0) continue;
    const int64_t cleared = plan_clear(item, job.prefix);
    if (cleared > 0) spreads.push_back(item), spread_blocks.push_back(cleared);
  }
  const double factor = options.mean ? options.p / double(samples) : options.p;
  with_tables<A>(slopes, [&](auto& table, size_t from) {
    const int64_t count = number_blocks(table, slope_blocks.data() + from);
    with_bool(options.js, [&](auto js) {
      with_bool(pooled, [&](auto pools) {
        gpu.launch(slope_kernel<A, js.value, pools.value, sizeof(table.item) / sizeof(SlopeItem)>,
                   count, threads, teams_shared(threads), table, samples, factor);
      });
    });
  });
  with_tables<A>(spreads, [&](auto& table, size_t from) {
    const int64_t count = number_blocks(table, spread_blocks.data() + from);
    with_power(options.p, [&](auto power) {
      gpu.launch(spread_kernel<A, decltype(power), sizeof(table.item) / sizeof(SpreadItem)>, count,
                 kThreads, 0, table, power);
    });
  });
}

}  // namespace lwkd::cuda
