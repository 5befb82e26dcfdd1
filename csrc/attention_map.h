// Σ_c |x|^p of one operand, read in place: rows of contiguous positions, rows of contiguous
// channels, or any strides at all.
#pragma once

#include "lanes.h"
#include "operand.h"

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

  // Calls row(offset, first position, count) for the runs that cover [begin, end).
  template <typename Row>
  LWKD_INLINE void cover(int64_t begin, int64_t end, const Row& row) const {
    if (end <= length) {  // nearly always: one run is all there is, and divisions are slow
      row(begin * stride, begin, end - begin);
      return;
    }
    for (int64_t at = begin; at < end;) {
      const int64_t run = at / length, index = at % length;
      const int64_t count = std::min(length - index, end - at);
      row(base(run) + index * stride, at, count);
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

// --- positions side by side: eight channels a pass, the map stays in L1 --------------------------

// `kAdd`: to what the map already holds.
template <bool kAdd, typename T, typename A, typename P>
LWKD_INLINE void add_eight(A* map, const T* x, int64_t stride_c, int64_t count, P p) {
  using Vector = typename Lanes<A>::Vector;
  constexpr int kCount = Lanes<A>::kCount;
  const T* const r[8] = {x,
                         x + stride_c,
                         x + 2 * stride_c,
                         x + 3 * stride_c,
                         x + 4 * stride_c,
                         x + 5 * stride_c,
                         x + 6 * stride_c,
                         x + 7 * stride_c};
  int64_t q = 0;
  for (; q + kCount <= count; q += kCount) {
    const Vector a = power(load(r[0] + q), p) + power(load(r[1] + q), p);
    const Vector b = power(load(r[2] + q), p) + power(load(r[3] + q), p);
    const Vector c = power(load(r[4] + q), p) + power(load(r[5] + q), p);
    const Vector d = power(load(r[6] + q), p) + power(load(r[7] + q), p);
    const Vector sum = (a + b) + (c + d);
    store(kAdd ? load(map + q) + sum : sum, map + q);
  }
  for (; q < count; ++q) {
    A v[8];
    for (int k = 0; k < 8; ++k) v[k] = power(widen(r[k][q]), p);
    const A sum = ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
    map[q] = kAdd ? map[q] + sum : sum;
  }
}

template <bool kAdd, typename T, typename A, typename P>
LWKD_INLINE void add_one(A* map, const T* x, int64_t count, P p) {
  constexpr int kCount = Lanes<A>::kCount;
  int64_t q = 0;
  for (; q + kCount <= count; q += kCount) {
    const auto v = power(load(x + q), p);
    store(kAdd ? load(map + q) + v : v, map + q);
  }
  for (; q < count; ++q) {
    const A v = power(widen(x[q]), p);
    map[q] = kAdd ? map[q] + v : v;
  }
}

template <typename T, typename A, typename P>
LWKD_INLINE void sum_positions(A* map, const T* x, int64_t stride_c, int64_t channels,
                               int64_t count, P p) {
  int64_t c = 0;
  if (channels >= 8) {
    add_eight<false>(map, x, stride_c, count, p);
    for (c = 8; c + 8 <= channels; c += 8)
      add_eight<true>(map, x + c * stride_c, stride_c, count, p);
  } else {
    add_one<false>(map, x, count, p);
    c = 1;
  }
  for (; c < channels; ++c) add_one<true>(map, x + c * stride_c, count, p);
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

// One run of one sample.
template <typename T, typename A, typename P>
LWKD_INLINE void sum_run(Order order, A* map, const T* x, int64_t stride_c, int64_t stride,
                         int64_t channels, int64_t count, P p) {
  constexpr bool kNative = std::is_same_v<A, decltype(widen(T()))>;
  if constexpr (!kNative)
    sum_strided(map, x, stride_c, stride, channels, count, p);
  else if (channels == 0 || order == Order::kStrided)
    sum_strided(map, x, stride_c, stride, channels, count, p);
  else if (order == Order::kPositions)
    sum_positions(map, x, stride_c, channels, count, p);
  else
    sum_channels(map, x, stride, channels, count, p);
}

// --- the way back: dx = coefficient[q] · d|x|^p/dx ----------------------------------------------

template <typename T, typename A, typename P>
LWKD_INLINE void spread_run(Order order, T* __restrict dx, const T* x, const A* coefficient,
                            int64_t dx_stride_c, int64_t dx_stride, int64_t stride_c,
                            int64_t stride, int64_t channels, int64_t count, P p) {
  if (order == Order::kChannels) {
    for (int64_t q = 0; q < count; ++q) {
      const A k = coefficient[q];
      const T* from = x + q * stride;
      T* __restrict to = dx + q * dx_stride;
#pragma GCC ivdep
      for (int64_t c = 0; c < channels; ++c)
        narrow(slope(k, static_cast<A>(widen(from[c])), p), to[c]);
    }
  } else if (order == Order::kPositions) {
    for (int64_t c = 0; c < channels; ++c) {
      const T* from = x + c * stride_c;
      T* __restrict to = dx + c * dx_stride_c;
#pragma GCC ivdep
      for (int64_t q = 0; q < count; ++q)
        narrow(slope(coefficient[q], static_cast<A>(widen(from[q])), p), to[q]);
    }
  } else {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t q = 0; q < count; ++q)
        narrow(slope(coefficient[q], static_cast<A>(widen(x[c * stride_c + q * stride])), p),
               dx[c * dx_stride_c + q * dx_stride]);
  }
}

}  // namespace lwkd
