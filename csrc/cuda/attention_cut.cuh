// What of an operand is read 16 bytes at a time, and how it is cut into blocks. All of it follows
// from shape, strides and alignment, so that results are the same bit for bit on every run.
#pragma once

#include <algorithm>

#include "attention_map.cuh"
#include "table.cuh"

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

// --- packs ---------------------------------------------------------------------------------------

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

// --- blocks --------------------------------------------------------------------------------------

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

// --- items ---------------------------------------------------------------------------------------

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
  bool same =
      a.dtype == b.dtype && a.c == b.c && a.stride_n == b.stride_n && a.stride_c == b.stride_c;
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

}  // namespace lwkd::cuda
