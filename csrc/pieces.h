// Numbers side by side in memory: sums of products of them in double, mixes of two, and how numbers
// of any stride and storage type come to lie so.
#pragma once

#include "rows.h"

namespace lwkd {
namespace {

// Adds term(V(), q), kTerms numbers a position, over positions: 16 partial sums each, added in one
// fixed order, as many at once as Wide has lanes.
template <int kTerms, typename Wide, typename A, typename Term>
LWKD_INLINE void sum_piece(const A* s, const A* t, int64_t count, double* out, const Term& term) {
  constexpr int kWide = kLanes<Wide>;
  Wide sum[kTerms][16 / kWide] = {};
  int64_t q = 0;
  for (; q + 16 <= count; q += 16) {
    read_ahead<16>(s + q);
    read_ahead<16>(t + q);
#pragma GCC unroll 8
    for (int v = 0; v < 16 / kWide; ++v) {
      const auto terms = term(Wide{}, q + kWide * v);
      for (int k = 0; k < kTerms; ++k) sum[k][v] += terms[k];
    }
  }
  for (int lane = 0; q < count; ++q, ++lane) {
    const auto terms = term(double(), q);
    for (int k = 0; k < kTerms; ++k) sum[k][lane / kWide][lane % kWide] += terms[k];
  }
  for (int k = 0; k < kTerms; ++k) out[k] = total(sum[k]);
}

template <typename Wide, typename A>
LWKD_INLINE void sum_difference(const A* s, const A* t, int64_t count, double* out) {
  sum_piece<1, Wide>(s, t, count, out, [&](auto v, int64_t q) LWKD_LAMBDA {
    using V = decltype(v);
    const V d = read<V>(s + q) - read<V>(t + q);
    return std::array<V, 1>{d * d};
  });
}

template <typename Wide, typename A>
LWKD_INLINE void sum_products(const A* s, const A* t, int64_t count, double* out) {
  sum_piece<3, Wide>(s, t, count, out, [&](auto v, int64_t q) LWKD_LAMBDA {
    using V = decltype(v);
    const V a = read<V>(s + q), b = read<V>(t + q);
    return std::array<V, 3>{a * a, b * b, a * b};
  });
}

template <typename Wide, typename A>
LWKD_INLINE void sum_squares(const A* x, const A*, int64_t count, double* out) {
  sum_piece<1, Wide>(x, x, count, out, [&](auto v, int64_t q) LWKD_LAMBDA {
    using V = decltype(v);
    const V a = read<V>(x + q);
    return std::array<V, 1>{a * a};
  });
}

// dx = own · x + other · y, in double: what is left of two nearly equal rows keeps its digits.
template <bool kOther, bool kPast, typename Wide, typename A>
LWKD_INLINE void combine(A* dx, const A* x, const A* y, int64_t count, double own, double other) {
  const auto at = [&](auto v, int64_t q) LWKD_LAMBDA {
    using V = decltype(v);
    V d = own * read<V>(x + q);
    if (kOther) d += other * read<V>(y + q);
    if constexpr (kPast && std::is_same_v<V, Wide>)
      write_past(__builtin_convertvector(d, Floats<kLanes<V>>), dx + q);
    else
      write(d, dx + q);
  };
  constexpr int kWide = kLanes<Wide>;
  int64_t q = 0;
  for (; q + 16 <= count; q += 16) {
    read_ahead<16>(x + q);
    if (kOther) read_ahead<16>(y + q);
#pragma GCC unroll 8
    for (int v = 0; v < 16 / kWide; ++v) at(Wide{}, q + kWide * v);
  }
  for (; q < count; ++q) at(double(), q);
}

// Runs to numbers of the compute type side by side, and back.
template <typename T, typename A>
LWKD_INLINE void gather(const T* from, Runs runs, A* to) {
  for (int64_t r = 0; r < runs.rows; ++r, from += runs.row_stride, to += runs.count)
    for (int64_t q = 0; q < runs.count; ++q) to[q] = static_cast<A>(widen(from[q * runs.stride]));
}
template <typename T, typename A>
LWKD_INLINE void gather_dense(const T* from, Runs runs, A* to) {
  for (int64_t r = 0; r < runs.rows; ++r, from += runs.row_stride, to += runs.count) {
    // Of short runs far apart, memory is asked for those next to them, which come after all rows.
    if (runs.count < 32) __builtin_prefetch(from + 64);
    int64_t q = 0;
    if constexpr (std::is_same_v<A, float>) {
      for (; q + 8 <= runs.count; q += 8) store(load(from + q), to + q);
      if (q > 0 && q < runs.count) {  // the last 8 again: faster than one by one
        q = runs.count;
        store(load(from + q - 8), to + q - 8);
      }
    }
    for (; q < runs.count; ++q) to[q] = static_cast<A>(widen(from[q]));
  }
}
template <typename T, typename A>
LWKD_INLINE void scatter(const A* from, T* to, Runs runs) {
  for (int64_t r = 0; r < runs.rows; ++r, from += runs.count, to += runs.row_stride)
    for (int64_t q = 0; q < runs.count; ++q) narrow(from[q], to[q * runs.stride]);
}
template <typename T, typename A>
LWKD_INLINE void scatter_dense(const A* from, T* to, Runs runs) {
  for (int64_t r = 0; r < runs.rows; ++r, from += runs.count, to += runs.row_stride) {
    int64_t q = 0;
    if constexpr (std::is_same_v<A, float>)
      for (; q + 8 <= runs.count; q += 8) store(load(from + q), to + q);
    for (; q < runs.count; ++q) narrow(from[q], to[q]);
  }
}

// --- one ordinary function per type: clones need that
// ----------------------------------------------

#define LWKD_PIECES(A)                                                                        \
  LWKD_WIDE_CLONES(void, difference, (const A* s, const A* t, int64_t count, double* out),    \
                   (s, t, count, out), sum_difference<Wide>(s, t, count, out);)               \
  LWKD_WIDE_CLONES(void, products, (const A* s, const A* t, int64_t count, double* out),      \
                   (s, t, count, out), sum_products<Wide>(s, t, count, out);)                 \
  LWKD_WIDE_CLONES(void, squares, (const A* x, const A* none, int64_t count, double* out),    \
                   (x, none, count, out), sum_squares<Wide>(x, none, count, out);)            \
  LWKD_WIDE_CLONES(void, mix,                                                                 \
                   (A * dx, const A* x, const A* y, int64_t count, double own, double other), \
                   (dx, x, y, count, own, other),                                             \
                   y == nullptr ? combine<false, false, Wide>(dx, x, x, count, own, other)    \
                                : combine<true, false, Wide>(dx, x, y, count, own, other);)
LWKD_PIECES(float)
LWKD_PIECES(double)

// As mix, past the caches: what is written is not read into them first. dx: of 16 bytes alignment.
LWKD_WIDE_CLONES(void, mix_past,
                 (float* dx, const float* x, const float* y, int64_t count, double own,
                  double other),
                 (dx, x, y, count, own, other),
                 y == nullptr ? combine<false, true, Wide>(dx, x, x, count, own, other)
                              : combine<true, true, Wide>(dx, x, y, count, own, other);
                 fence_past();)

#define LWKD_MOVES(T, A)                                                        \
  [[maybe_unused]] LWKD_CLONES void bring(const T* from, Runs runs, A* to) {    \
    runs.stride == 1 ? gather_dense(from, runs, to) : gather(from, runs, to);   \
  }                                                                             \
  [[maybe_unused]] LWKD_CLONES void put(const A* from, T* to, Runs runs) {      \
    runs.stride == 1 ? scatter_dense(from, to, runs) : scatter(from, to, runs); \
  }
LWKD_MOVES(float, float)
LWKD_MOVES(Half, float)
LWKD_MOVES(BFloat16, float)
LWKD_MOVES(float, double)
LWKD_MOVES(Half, double)
LWKD_MOVES(BFloat16, double)
LWKD_MOVES(double, double)

// Calls run(T()) with the storage type.
template <typename A, typename Run>
void with_storage(ScalarType dtype, const Run& run) {
  if constexpr (std::is_same_v<A, double>)
    if (dtype == ScalarType::Double) return run(double{});
  if (dtype == ScalarType::Half) return run(Half{});
  if (dtype == ScalarType::BFloat16) return run(BFloat16{});
  run(float{});
}

// Elements [begin, end) of stream k of a row: in place, or brought to `buffer`.
template <typename A>
const A* fetch(const RowWalk& walk, int k, int64_t row, int64_t begin, int64_t end, A* buffer) {
  if (const A* in_place = walk.direct<A>(k, row, begin)) return in_place;
  with_storage<A>(walk.streams[k].dtype, [&](auto type) {
    using T = decltype(type);
    walk.cover(k, row, begin, end, [&](char* from, Runs runs, int64_t first) {
      bring(reinterpret_cast<const T*>(from), runs, buffer + first);
    });
  });
  return buffer;
}

template <typename A>
void leave(const RowWalk& walk, int k, int64_t row, int64_t begin, int64_t end, const A* buffer) {
  with_storage<A>(walk.streams[k].dtype, [&](auto type) {
    using T = decltype(type);
    walk.cover(k, row, begin, end, [&](char* to, Runs runs, int64_t first) {
      put(buffer + first, reinterpret_cast<T*>(to), runs);
    });
  });
}

}  // namespace
}  // namespace lwkd
