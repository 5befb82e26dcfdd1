// Σ_c |x|^p of one operand, read in place: rows of contiguous positions, rows of contiguous
// channels, or any strides at all.
#pragma once

#include "lanes.h"
#include "operand.h"
#include "schedule.h"

namespace lwkd {

// Positions fall into runs of one stride: offset(position) = base(run) + index · stride.
struct Runs {
  int64_t length, stride;
  int64_t outer_size;  // of the middle dimension, where it is not part of the run
  int64_t outer_stride[2];

  explicit Runs(const Operand& o) : length(o.size[2]), stride(o.stride[2]) {
    int64_t size[3] = {o.size[0], o.size[1], 1}, step[3] = {o.stride[0], o.stride[1], 0};
    for (int d = 1; d >= 0; --d) {
      if (size[d] == 1) continue;
      const bool joins = length == 1 || step[d] == length * stride;
      const bool clear = d == 1 || size[1] == 1;  // a dimension joins only next to the run
      if (!joins || !clear) continue;
      stride = length == 1 ? step[d] : stride;
      length *= size[d];
      size[d] = 1;
    }
    outer_size = size[1];
    outer_stride[0] = step[0];
    outer_stride[1] = step[1];
  }

  int64_t base(int64_t run) const {
    return run / outer_size * outer_stride[0] + run % outer_size * outer_stride[1];
  }

  // Calls row(offset, first position, count) for the runs that cover [begin, end). It stands here
  // once: it is inlined, and whole kernels with it.
  template <typename Row>
  LWKD_INLINE void cover(int64_t begin, int64_t end, const Row& row) const {
    const bool one = end <= length;  // nearly always, and divisions are slow
    for (int64_t at = begin; at < end;) {
      const int64_t run = one ? 0 : at / length, index = at - run * length;
      const int64_t count = std::min(length - index, end - at);
      row(one ? index * stride : base(run) + index * stride, at, count);
      at += count;
    }
  }
};

// Which way a run is read: positions side by side, channels side by side, or neither.
enum class Order { kPositions, kChannels, kStrided };

inline Order order_of(const Runs& runs, int64_t stride_c, int64_t channels) {
  if (runs.stride == 1 && (runs.length >= 8 || stride_c != 1)) return Order::kPositions;
  if (stride_c == 1 && channels > 1) return Order::kChannels;
  return runs.stride == 1 || runs.length == 1 ? Order::kPositions : Order::kStrided;
}

// An operand and how it is read, worked out once a call.
struct Source : Operand {
  Runs runs;
  Order order;

  explicit Source(const Operand& o) : Operand(o), runs(o), order(order_of(runs, o.stride_c, o.c)) {}
};

// --- positions side by side ----------------------------------------------------------------------

// Channels that are summed before they are added to the map: the depth of roundings is then
// kGroup + C / kGroup, and not C.
constexpr int64_t kGroup = 64;
constexpr int kStep = 4;  // vectors of a row at a time: fewer would ask for a line twice

// A power that takes longer than memory does: one loop is as fast as any, and there are few of it.
template <typename P>
constexpr bool kSlow = std::is_same_v<P, Any>;

// Up to 8 vectors of positions stay in registers while all channels go by. The last vector reaches
// back over the one before it where `count` is no multiple, so that there is no tail. `kSets`
// accumulators a position take turns, or the additions would wait for each other.
template <int kVectors, typename T, typename A, typename P>
LWKD_INLINE void sum_few(A* map, const T* x, int64_t stride_c, int64_t channels, int64_t count,
                         P p) {
  using Vector = typename Lanes<A>::Vector;
  constexpr int kCount = Lanes<A>::kCount, kSets = 8 / kVectors < 4 ? 8 / kVectors : 4;
  int64_t at[kVectors];
  for (int v = 0; v < kVectors; ++v) at[v] = std::min<int64_t>(v * kCount, count - kCount);
  for (int64_t begin = 0; begin < channels; begin += kGroup) {
    const int64_t end = std::min(begin + kGroup, channels);
    Vector sum[kSets][kVectors] = {};
    int64_t c = begin;
    for (; c + kSets <= end; c += kSets)
      for (int k = 0; k < kSets; ++k) {
        const T* row = x + (c + k) * stride_c;
        read_ahead<kVectors * kCount>(row);
        for (int v = 0; v < kVectors; ++v) sum[k][v] += power(load(row + at[v]), p);
      }
    for (; c < end; ++c)
      for (int v = 0; v < kVectors; ++v) sum[0][v] += power(load(x + c * stride_c + at[v]), p);
    for (int half = kSets / 2; half > 0; half /= 2)
      for (int k = 0; k < half; ++k)
        for (int v = 0; v < kVectors; ++v) sum[k][v] += sum[k + half][v];
    // All are read before any is written: two vectors may share positions.
    for (int v = 0; v < kVectors && begin > 0; ++v) sum[0][v] += load(map + at[v]);
    for (int v = 0; v < kVectors; ++v) store(sum[0][v], map + at[v]);
  }
}

// One channel to what `map` holds, or in its place. Where channels lie side by side, one after the
// other is one stream through memory; several rows at once are slower.
template <bool kAdd, typename T, typename A, typename P>
LWKD_INLINE void add_channel(A* map, const T* x, int64_t count, P p) {
  constexpr int kCount = Lanes<A>::kCount;
  const auto add = [&](int64_t q) LWKD_LAMBDA {
    const auto v = power(load(x + q), p);
    store(kAdd ? load(map + q) + v : v, map + q);
  };
  int64_t q = 0;
  for (; q + kStep * kCount <= count; q += kStep * kCount) {
    read_ahead<kStep * kCount>(x + q);
    for (int v = 0; v < kStep; ++v) add(q + v * kCount);
  }
  for (; q + kCount <= count; q += kCount) add(q);
  for (; q < count; ++q) {
    const A v = power(widen(x[q]), p);
    map[q] = kAdd ? map[q] + v : v;
  }
}

template <typename T, typename A, typename P>
LWKD_INLINE void sum_many(A* map, const T* x, int64_t stride_c, int64_t channels, int64_t count,
                          P p) {
  alignas(64) A group[kTile];
  for (int64_t begin = 0; begin < channels; begin += kGroup) {
    const int64_t end = std::min(begin + kGroup, channels);
    A* to = begin == 0 ? map : group;
    add_channel<false>(to, x + begin * stride_c, count, p);
    for (int64_t c = begin + 1; c < end; ++c) add_channel<true>(to, x + c * stride_c, count, p);
    for (int64_t q = 0; begin > 0 && q < count; ++q) map[q] += group[q];
  }
}

template <typename T, typename A, typename P>
LWKD_INLINE void sum_positions(A* map, const T* x, int64_t stride_c, int64_t channels,
                               int64_t count, P p) {
  constexpr int kCount = Lanes<A>::kCount;
  if (kSlow<P> || count < kCount || count > 8 * kCount)
    sum_many(map, x, stride_c, channels, count, p);
  else if (count > 4 * kCount)
    sum_few<8>(map, x, stride_c, channels, count, p);
  else if (count > 2 * kCount)
    sum_few<4>(map, x, stride_c, channels, count, p);
  else
    sum_few<2>(map, x, stride_c, channels, count, p);
}

// --- channels side by side: four vectors of partial sums, added in one fixed order ---------------

template <typename T, typename A, typename P>
LWKD_INLINE void sum_channels(A* map, const T* x, int64_t stride, int64_t channels, int64_t count,
                              P p) {
  using Vector = typename Lanes<A>::Vector;
  constexpr int kCount = Lanes<A>::kCount;
  for (int64_t q = 0; q < count; ++q) {
    const T* r = x + q * stride;
    Vector a{}, b{}, c{}, d{};
    int64_t i = 0;
    for (; i + 4 * kCount <= channels; i += 4 * kCount) {
      a += power(load(r + i), p);
      b += power(load(r + i + kCount), p);
      c += power(load(r + i + 2 * kCount), p);
      d += power(load(r + i + 3 * kCount), p);
    }
    for (; i + kCount <= channels; i += kCount) a += power(load(r + i), p);
    A tail = 0;
    for (; i < channels; ++i) tail += power(widen(r[i]), p);
    map[q] = total((a + b) + (c + d)) + tail;
  }
}

template <typename T, typename A, typename P>
LWKD_INLINE void sum_strided(A* __restrict map, const T* x, int64_t stride_c, int64_t stride,
                             int64_t channels, int64_t count, P p) {
  for (int64_t q = 0; q < count; ++q) map[q] = 0;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t q = 0; q < count; ++q)
      map[q] += power(static_cast<A>(widen(x[c * stride_c + q * stride])), p);
}

// Whether T is computed in what it widens to: else plain loops will do.
template <typename T, typename A>
constexpr bool kNative = std::is_same_v<A, decltype(widen(T()))>;

// One run of one sample.
template <typename T, typename A, typename P>
LWKD_INLINE void sum_run(Order order, A* map, const T* x, int64_t stride_c, int64_t stride,
                         int64_t channels, int64_t count, P p) {
  if constexpr (!kNative<T, A>)
    sum_strided(map, x, stride_c, stride, channels, count, p);
  else if (channels == 0 || order == Order::kStrided)
    sum_strided(map, x, stride_c, stride, channels, count, p);
  else if (order == Order::kPositions)
    sum_positions(map, x, stride_c, channels, count, p);
  else
    sum_channels(map, x, stride, channels, count, p);
}

// --- the way back: dx = coefficient[q] · d|x|^p/dx ----------------------------------------------

// As sum_few: the coefficients stay in registers.
template <int kVectors, typename T, typename A, typename P>
LWKD_INLINE void spread_few(T* dx, const T* x, const A* coefficient, int64_t dx_stride_c,
                            int64_t stride_c, int64_t channels, int64_t count, P p) {
  constexpr int kCount = Lanes<A>::kCount;
  typename Lanes<A>::Vector c[kVectors];
  int64_t at[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    at[v] = std::min<int64_t>(v * kCount, count - kCount);
    c[v] = load(coefficient + at[v]);
  }
  for (int64_t i = 0; i < channels; ++i) {
    read_ahead<kVectors * kCount>(x + i * stride_c);
    for (int v = 0; v < kVectors; ++v)
      store(slope(c[v], load(x + i * stride_c + at[v]), p), dx + i * dx_stride_c + at[v]);
  }
}

// One row: a coefficient a position, or (`kOne`) the same all along.
template <bool kOne, typename T, typename A, typename P>
LWKD_INLINE void spread_row(T* dx, const T* x, const A* coefficient, int64_t count, P p) {
  using Vector = typename Lanes<A>::Vector;
  constexpr int kCount = Lanes<A>::kCount;
  const Vector one = Vector{} + *coefficient;
  const auto spread = [&](int64_t q) LWKD_LAMBDA {
    store(slope(kOne ? one : load(coefficient + q), load(x + q), p), dx + q);
  };
  int64_t q = 0;
  for (; q + kStep * kCount <= count; q += kStep * kCount) {
    read_ahead<kStep * kCount>(x + q);
    for (int v = 0; v < kStep; ++v) spread(q + v * kCount);
  }
  for (; q + kCount <= count; q += kCount) spread(q);
  for (; q < count; ++q) narrow(slope(coefficient[kOne ? 0 : q], A(widen(x[q])), p), dx[q]);
}

template <typename T, typename A, typename P>
LWKD_INLINE void spread_positions(T* dx, const T* x, const A* c, int64_t dx_stride_c,
                                  int64_t stride_c, int64_t channels, int64_t count, P p) {
  constexpr int kCount = Lanes<A>::kCount;
  if (kSlow<P> || count < kCount || count > 8 * kCount)
    for (int64_t i = 0; i < channels; ++i)
      spread_row<false>(dx + i * dx_stride_c, x + i * stride_c, c, count, p);
  else if (count > 4 * kCount)
    spread_few<8>(dx, x, c, dx_stride_c, stride_c, channels, count, p);
  else if (count > 2 * kCount)
    spread_few<4>(dx, x, c, dx_stride_c, stride_c, channels, count, p);
  else
    spread_few<2>(dx, x, c, dx_stride_c, stride_c, channels, count, p);
}

template <typename T, typename A, typename P>
LWKD_INLINE void spread_run(Order order, T* __restrict dx, const T* x, const A* coefficient,
                            int64_t dx_stride_c, int64_t dx_stride, int64_t stride_c,
                            int64_t stride, int64_t channels, int64_t count, P p) {
  if constexpr (kNative<T, A>) {
    if (order == Order::kPositions)
      return spread_positions(dx, x, coefficient, dx_stride_c, stride_c, channels, count, p);
    if (order == Order::kChannels) {
      for (int64_t q = 0; q < count; ++q)
        spread_row<true>(dx + q * dx_stride, x + q * stride, coefficient + q, channels, p);
      return;
    }
  }
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t q = 0; q < count; ++q)
      narrow(slope(coefficient[q], static_cast<A>(widen(x[c * stride_c + q * stride])), p),
             dx[c * dx_stride_c + q * dx_stride]);
}

}  // namespace lwkd
