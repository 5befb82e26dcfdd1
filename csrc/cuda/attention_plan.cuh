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

// The powers people train with have kernels of their own.
template <typename A, typename Run>
void with_power(double p, const Run& run) {
  if constexpr (std::is_same_v<A, float>) {
    if (p == 2) return run(Two{});
    if (p == 1) return run(One{});
  }
  run(Any{p});
}

template <typename Run>
void with_bool(bool value, const Run& run) {
  if (value)
    run(std::true_type{});
  else
    run(std::false_type{});
}

constexpr int64_t kMapShared[2] = {kThreads * 8 * 4, kThreads * 2 * 8};  // float, double

// Threads of a sample's team, and of a block of teams.
inline int32_t team_of(int64_t cells, int threads) { return cells <= 256 ? 32 : threads; }
inline int block_of(int64_t most_cells) { return most_cells >= 8192 ? kDistanceThreads : kThreads; }
inline int64_t teams_shared(int threads) { return threads / 32 * 3 * 8; }

// --- forward -------------------------------------------------------------------------------------

template <typename A, typename Launcher>
void launch_maps(Launcher& gpu, const std::vector<MapItem>& items, const int64_t* blocks, double p,
                 int32_t* done, int layers) {
  with_power<A>(p, [&](auto power) {
    using P = decltype(power);
    with_tables<P::kCommon>(items, [&](auto& table, size_t from) {
      const int64_t count = number_blocks(table, blocks + from);
      gpu.launch(maps_kernel<A, P, sizeof(table.item) / sizeof(MapItem)>,
                 std::max<int64_t>(count, 1), kThreads, kMapShared[sizeof(A) == 8], table, power,
                 from == 0 ? done : nullptr, layers);
    });
  });
}

// Plans both maps of every layer. `aside[k]` is where in the scratch operand k's raw map goes, -1
// where it goes straight into the result.
template <typename A>
void plan_maps(const std::vector<LayerViews>& layers, A* maps, Scratch& scratch,
               std::vector<MapItem>& items, std::vector<int64_t>& blocks,
               std::vector<int64_t>& aside) {
  for (const LayerViews& layer : layers) {
    const View(&side)[2] = layer.side;
    const bool twins = same_layout(side[0], side[1]);
    const bool packs[2] = {can_pack<A>(side[0]), can_pack<A>(side[1])};
    for (int k = 0; k < 2; ++k) {
      // Operands of one layout are added up in one order: equal ones must be at distance 0.
      const bool packed = twins ? packs[0] && packs[1] : packs[k];
      MapItem item;
      blocks.push_back(plan_map<A>(item, side[k], packed, true));
      item.out = maps;
      maps += side[k].n * layer.cells();
      const bool pooled = !std::equal(side[k].size, side[k].size + 3, layer.space);
      const int64_t raw = item.cut.splits * side[k].n * side[k].positions();
      aside.push_back(pooled || item.cut.splits > 1 ? scratch.reserve(raw, sizeof(A)) : -1);
      items.push_back(item);
    }
  }
}

inline DistanceItem plan_distance(const LayerViews& layer, const MapItem* items, int threads) {
  DistanceItem d{};
  d.cells = layer.cells();
  d.mask = layer.mask;
  d.team = team_of(d.cells, threads);
  d.blocks = static_cast<int32_t>(ceil_div(layer.side[0].n, threads / d.team));
  std::copy_n(layer.space, 3, d.space);
  for (int k = 0; k < 2; ++k) {
    d.side[k].map = items[k].out;
    d.side[k].splits = items[k].cut.splits;
    std::copy_n(layer.side[k].size, 3, d.side[k].size);
  }
  return d;
}

// Writes every map, then the distances: [L] of the mean, or [L, N].
template <typename A, typename Launcher>
void forward(Launcher& gpu, const std::vector<LayerViews>& layers, A* maps, A* out,
             const Options& options) {
  const int64_t length = layers.size(), samples = layers[0].side[0].n;
  if (samples == 0) return gpu.clear(out, options.mean ? length * sizeof(A) : 0);
  Scratch scratch;
  const int64_t each = options.mean ? scratch.reserve(length * samples, sizeof(double)) : 0;
  const int64_t done = options.mean ? scratch.reserve(length, sizeof(int32_t)) : 0;
  std::vector<MapItem> items;
  std::vector<DistanceItem> distances;
  std::vector<int64_t> blocks, aside, distance_blocks;
  plan_maps(layers, maps, scratch, items, blocks, aside);
  scratch.data = static_cast<char*>(gpu.allocate(scratch.bytes));
  int64_t most_cells = 0;
  for (const LayerViews& layer : layers) most_cells = std::max(most_cells, layer.cells());
  const int threads = block_of(most_cells);
  for (int64_t l = 0; l < length; ++l) {
    DistanceItem d = plan_distance(layers[l], &items[2 * l], threads);
    for (int k = 0; k < 2; ++k)
      if (aside[2 * l + k] >= 0)
        d.side[k].raw = items[2 * l + k].out = scratch.at<void>(aside[2 * l + k]);
    d.out = out + (options.mean ? l : l * samples);
    if (options.mean) {
      d.each = scratch.at<double>(each) + l * samples;
      d.done = scratch.at<int32_t>(done) + l;
    }
    distances.push_back(d);
    distance_blocks.push_back(d.blocks);
  }
  launch_maps<A>(gpu, items, blocks.data(), options.p,
                 options.mean ? scratch.at<int32_t>(done) : nullptr, static_cast<int>(length));
  with_tables<sizeof(A) == 4>(distances, [&](auto& table, size_t from) {
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

inline SlopeItem plan_slope(const GradientViews& job, void* out, int threads) {
  SlopeItem c{};
  c.own = job.own;
  c.other = job.other;
  c.out = out;
  std::copy_n(job.x.size, 3, c.size);
  std::copy_n(job.space, 3, c.space);
  c.positions = job.x.positions();
  c.cells = job.cells();
  c.mask = job.mask;
  c.grad = job.grad;
  c.grad_stride = job.grad_stride;
  c.weight = job.weight;
  c.team = team_of(c.positions, threads);
  return c;
}

template <typename A, typename Launcher>
void launch_slopes(Launcher& gpu, const std::vector<SlopeItem>& items, int64_t samples, int threads,
                   const Options& options) {
  std::vector<int64_t> blocks;
  bool pooled = false;
  for (const SlopeItem& c : items) {
    blocks.push_back(ceil_div(samples, threads / c.team));
    pooled = pooled || c.cells != c.positions;
  }
  const double factor = options.mean ? options.p / double(samples) : options.p;
  with_tables<sizeof(A) == 4>(items, [&](auto& table, size_t from) {
    const int64_t count = number_blocks(table, blocks.data() + from);
    with_bool(options.js, [&](auto js) {
      with_bool(pooled, [&](auto pools) {
        gpu.launch(slope_kernel<A, js.value, pools.value, sizeof(table.item) / sizeof(SlopeItem)>,
                   count, threads, teams_shared(threads), table, samples, factor);
      });
    });
  });
}

template <typename A, typename Launcher>
void launch_spreads(Launcher& gpu, const std::vector<SpreadItem>& items,
                    const std::vector<int64_t>& blocks, double p) {
  with_power<A>(p, [&](auto power) {
    using P = decltype(power);
    with_tables<P::kCommon>(items, [&](auto& table, size_t from) {
      const int64_t count = number_blocks(table, blocks.data() + from);
      gpu.launch(spread_kernel<A, P, sizeof(table.item) / sizeof(SpreadItem)>, count, kThreads, 0,
                 table, power);
    });
  });
}

// Writes every dx.
template <typename A, typename Launcher>
void backward(Launcher& gpu, const std::vector<GradientViews>& jobs, const Options& options) {
  const int64_t samples = jobs[0].x.n;
  if (samples == 0) return;
  Scratch scratch;
  std::vector<int64_t> offsets, blocks;
  int64_t most = 0;
  for (const GradientViews& job : jobs) {
    offsets.push_back(scratch.reserve(samples * job.x.positions(), sizeof(A)));
    most = std::max({most, job.cells(), job.x.positions()});
  }
  scratch.data = static_cast<char*>(gpu.allocate(scratch.bytes));
  std::vector<SlopeItem> slopes;
  std::vector<SpreadItem> spreads;
  const auto add = [&](const SpreadItem& item, int64_t count) {
    if (count > 0) spreads.push_back(item), blocks.push_back(count);
  };
  for (size_t i = 0; i < jobs.size(); ++i) {
    void* slope = scratch.at<void>(offsets[i]);
    slopes.push_back(plan_slope(jobs[i], slope, block_of(most)));
    SpreadItem item;
    const int64_t count = plan_spread<A>(item, jobs[i].x, jobs[i].dx);
    item.slope = slope;
    add(item, count);
    if (jobs[i].prefix.c > 0) {
      const int64_t cleared = plan_clear(item, jobs[i].prefix);
      add(item, cleared);
    }
  }
  launch_slopes<A>(gpu, slopes, samples, block_of(most), options);
  launch_spreads<A>(gpu, spreads, blocks, options.p);
}

}  // namespace lwkd::cuda
