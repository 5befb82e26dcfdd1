// How a call of the attention kind becomes launches: what is read 16 bytes at a time, how operands
// are cut into blocks, where scratch goes. All of it follows from shapes, strides and alignment, so
// that results are the same bit for bit on every run. No torch here: tests/cuda/emulation runs it.
#pragma once

#include <algorithm>
#include <vector>

#include "attention_kernels.cuh"

namespace lwkd::cuda {

// One activation tensor, read in place as [N, C, d0, d1, d2]; strides in elements.
struct View {
  void* data;
  int32_t dtype;
  int64_t n, c, size[3];
  int64_t stride_n, stride_c, stride[3];

  int64_t positions() const { return size[0] * size[1] * size[2]; }
  int64_t element() const { return dtype == kDouble ? 8 : dtype == kFloat ? 4 : 2; }
};

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

// Items of a launch: as many as a kernel parameter holds (32,764 bytes), and a short table for the
// usual few layers, since the whole table travels with every launch.
#ifdef LWKD_EMULATE
constexpr int kFewItems = 2, kManyItems = 6;
#else
constexpr int kFewItems = 32, kManyItems = 128;
#endif
constexpr int64_t kTableBytes = 32764 - 64;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// --- cutting -------------------------------------------------------------------------------------

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Positions of `count` tensors of one shape as one run each, where they all have one.
inline void read_space(const int64_t (&size)[3], const int64_t* const* strides, Space* const* out,
                       int count) {
  bool joins = true;
  for (int v = 0; v < count; ++v) {
    int64_t length = 1, stride = 1;
    for (int d = 2; d >= 0; --d) {
      if (size[d] == 1) continue;
      if (length == 1) stride = strides[v][d];
      joins = joins && strides[v][d] == length * stride;
      length *= size[d];
    }
    *out[v] = {length, 1, {0, 0, stride}};
  }
  for (int v = 0; v < count && !joins; ++v)
    *out[v] = {size[2], size[1], {strides[v][0], strides[v][1], strides[v][2]}};
}

inline int64_t gcd(int64_t a, int64_t b) { return b == 0 ? a : gcd(b, a % b); }

// Whether `width` elements can be read at once, channels side by side.
inline bool rows_packed(const View& v, int64_t width) {
  bool fits = aligned(v.data) && v.c % width == 0 && (v.n <= 1 || v.stride_n % width == 0);
  for (int d = 0; d < 3; ++d) fits = fits && (v.size[d] <= 1 || v.stride[d] % width == 0);
  return fits;
}

// Whether `width` elements can be read at once, positions side by side: channels are whole packs,
// or follow each other without a gap and meet the packs' borders again soon enough.
inline bool plane_packed(const View& v, const Space& space, int64_t width) {
  const int64_t positions = v.positions();
  if (space.length != positions || space.stride[2] != 1) return false;
  if (!aligned(v.data) || (v.n > 1 && v.stride_n % width != 0)) return false;
  if (positions % width == 0) return v.c <= 1 || v.stride_c % width == 0;
  return v.c * positions % width == 0 && (v.c <= 1 || v.stride_c == positions) &&
         positions / gcd(positions, width) <= kThreads;
}

inline int32_t order_of(const View& v, const Space& space) {
  const bool runs = space.stride[2] == 1 && space.length == v.positions() && v.positions() > 1;
  return v.stride_c == 1 && v.c > 1 && !runs ? kRows : kPlane;
}

// Few blocks: the channels are split, as long as a thread keeps eight loads.
inline void split(Cut& cut, int64_t blocks, int64_t length, int64_t step) {
  cut.splits = 1;
  if (blocks > 0 && blocks < 256 && length >= 16 * step)
    cut.splits = std::min(ceil_div(512, blocks), length / (8 * step));
  cut.chunk = std::max<int64_t>(ceil_div(ceil_div(length, cut.splits), step) * step, 1);
  cut.splits = std::max<int64_t>(ceil_div(length, cut.chunk), 1);
}

// Threads side by side over `period` packs: few idle threads, at least 16 neighbours.
inline int32_t plane_width(int64_t period, int64_t periods) {
  const int64_t most = periods < 32 ? kThreads : 64;  // few channels: threads go to positions
  if (period <= most) return static_cast<int32_t>(std::max<int64_t>(period, 1));
  if (most == kThreads) return kThreads;
  int32_t best = 0;
  double score = 0;
  for (int32_t width : {64, 56, 50, 42, 32}) {
    const double busy = double(kThreads / width * width) / kThreads;
    const double used = double(period) / double(ceil_div(period, width) * width);
    if (busy * used > score) best = width, score = busy * used;
  }
  return best;
}

// Returns the blocks of one operand. `splittable`: parts of the channels may be summed apart.
inline int64_t cut_plane(Cut& cut, const View& v, int64_t width, bool splittable) {
  const int64_t positions = v.positions();
  if (v.n == 0 || positions == 0) return 0;
  const int64_t shared = gcd(positions, width);
  cut.period = positions / shared;
  cut.total = v.c * positions / width;
  const int64_t periods = ceil_div(cut.total, cut.period);
  cut.width = width == shared ? plane_width(cut.period, periods) : int32_t(cut.period);
  cut.tiles = ceil_div(cut.period, cut.width);
  const int64_t most = kThreads / cut.width;
  cut.groups = static_cast<int32_t>(std::clamp<int64_t>(ceil_div(periods, 8), 1, most));
  const int64_t samples = cut.tiles > 1 ? 1 : kThreads / (cut.width * cut.groups);
  cut.count = static_cast<int32_t>(std::min(samples, v.n));
  const int64_t blocks = cut.tiles * ceil_div(v.n, cut.count);
  split(cut, splittable ? blocks : 0, periods, cut.groups);
  return blocks * cut.splits;
}

inline int64_t cut_rows(Cut& cut, const View& v, int64_t width, bool splittable) {
  const int64_t rows = v.n * v.positions();
  if (rows == 0) return 0;
  cut.total = v.c / width;
  int64_t lanes = 1;
  if (width == 1) {
    while (lanes < 32 && lanes < v.c) lanes *= 2;
  } else {  // four loads a thread before neighbours join; few rows: more neighbours
    while (lanes < 32 && cut.total >= 8 * lanes && (lanes < 8 || rows * lanes < 65536)) lanes *= 2;
  }
  cut.width = static_cast<int32_t>(lanes);
  const int64_t at_once = kThreads / lanes, loads = ceil_div(cut.total, lanes);
  int64_t turns = std::clamp<int64_t>(32 / std::max<int64_t>(loads, 1), 1, 16);
  turns = std::clamp<int64_t>(rows / (at_once * 1024), 1, turns);
  cut.count = static_cast<int32_t>(at_once * turns);
  const int64_t blocks = ceil_div(rows, cut.count);
  split(cut, splittable ? blocks : 0, cut.total, lanes);
  return blocks * cut.splits;
}

inline int64_t cut_view(Cut& cut, const View& v, int64_t width, bool splittable) {
  return cut.order == kRows ? cut_rows(cut, v, width, splittable)
                            : cut_plane(cut, v, width, splittable);
}

// Elements of a pack in a call that computes in A.
template <typename A>
int64_t pack_width(const View& v) {
  return sizeof(A) == 8 && v.dtype != kDouble ? 1 : 16 / v.element();
}

// From one period to the next.
inline int64_t plane_step(const View& v, const Cut& cut, int64_t width) {
  return v.positions() % width == 0 ? v.stride_c : cut.period * width;
}

inline bool same_layout(const View& a, const View& b) {
  bool same = a.dtype == b.dtype && a.c == b.c && a.stride_n == b.stride_n &&
              a.stride_c == b.stride_c;
  for (int d = 0; d < 3; ++d) same = same && a.size[d] == b.size[d] && a.stride[d] == b.stride[d];
  return same;
}

template <typename A>
bool can_pack(const View& v) {
  Space space;
  Space* out = &space;
  const int64_t* strides = v.stride;
  read_space(v.size, &strides, &out, 1);
  const int64_t width = pack_width<A>(v);
  return width > 1 && v.c > 0 &&
         (order_of(v, space) == kRows ? rows_packed(v, width) : plane_packed(v, space, width));
}

// Fills everything but `first` and `out`; returns the blocks.
template <typename A>
int64_t plan_map(MapItem& item, const View& v, bool packed, bool splittable) {
  item = {};
  item.x = v.data;
  item.n = v.n;
  item.positions = v.positions();
  item.walk.stride_n = v.stride_n;
  Space* out = &item.walk.space;
  const int64_t* strides = v.stride;
  read_space(v.size, &strides, &out, 1);
  item.cut.order = order_of(v, item.walk.space);
  item.cut.dtype = v.dtype;
  item.cut.packed = packed;
  const int64_t width = packed ? pack_width<A>(v) : 1;
  const int64_t blocks = cut_view(item.cut, v, width, splittable);
  if (item.cut.order == kPlane) item.walk.step = plane_step(v, item.cut, width);
  return blocks;
}

// --- launching -----------------------------------------------------------------------------------

// A launcher offers allocate(bytes), clear(pointer, bytes) and
// launch(kernel, blocks, threads, shared bytes, arguments...).

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

template <typename A>
int64_t plan_spread(SpreadItem& item, const View& x, const View& dx) {
  item = {};
  item.x = x.data;
  item.dx = dx.data;
  item.n = x.n;
  item.positions = x.positions();
  item.from.stride_n = x.stride_n;
  item.to.stride_n = dx.stride_n;
  Space* out[2] = {&item.from.space, &item.to.space};
  const int64_t* strides[2] = {x.stride, dx.stride};
  read_space(x.size, strides, out, 2);
  const int32_t from = order_of(x, item.from.space), to = order_of(dx, item.to.space);
  int64_t width = pack_width<A>(x);
  const bool packed = width > 1 && x.c > 0 && from == to &&
                      (from == kRows ? rows_packed(x, width) && rows_packed(dx, width)
                                     : plane_packed(x, item.from.space, width) &&
                                           plane_packed(dx, item.to.space, width));
  if (!packed) width = 1;
  item.cut.order = from == to ? from : kPlane;
  item.cut.dtype = x.dtype;
  item.cut.packed = packed;
  const int64_t blocks = x.c == 0 ? 0 : cut_view(item.cut, x, width, true);
  if (item.cut.order == kPlane && blocks > 0) {
    item.from.step = plane_step(x, item.cut, width);
    item.to.step = plane_step(dx, item.cut, width);
  }
  return blocks;
}

inline int64_t plan_clear(SpreadItem& item, const View& tokens) {
  item = {};
  item.dx = tokens.data;
  item.n = tokens.n;
  item.positions = tokens.positions();
  item.to = {tokens.stride_n, tokens.stride_c, {item.positions, 1, {0, 0, tokens.stride[2]}}};
  item.cut.order = kClear;
  item.cut.dtype = tokens.dtype;
  item.cut.total = tokens.c;
  item.cut.count = 16 * kThreads;
  return ceil_div(tokens.n * item.positions * tokens.c, item.cut.count);
}

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
