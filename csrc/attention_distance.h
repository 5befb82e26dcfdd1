// From two maps of one sample to their distance, and back to the gradient of either map. All of it
// in double: a norm of float32 maps overflows float32, and the cost is one channel in C. Formulas
// are written once, for V = double (one position) and V = Double4 (four side by side).
#pragma once

#include <limits>

#include "lanes.h"

namespace lwkd {

constexpr double kEps = 1e-12;
constexpr double kSeries = 0.02;  // below this |u| the series of f is exact to rounding

// Σ term(V(), q) over positions: eight partial sums, added in one fixed order.
template <typename Term>
LWKD_INLINE double sum_terms(int64_t count, const Term& term) {
  Double4 low{}, high{};
  int64_t q = 0;
  for (; q + 8 <= count; q += 8) {
    low += term(Double4{}, q);
    high += term(Double4{}, q + 4);
  }
  for (int k = 0; q + k < count; ++k) {
    const double v = term(double(), q + k);
    k < 4 ? low[k] += v : high[k - 4] += v;
  }
  return total(low + high);
}

// each(V(), q) for all positions.
template <typename Each>
LWKD_INLINE void for_each(int64_t count, const Each& each) {
  int64_t q = 0;
  for (; q + 4 <= count; q += 4) each(Double4{}, q);
  for (; q < count; ++q) each(double(), q);
}

LWKD_INLINE uint64_t bits_of(double v) { return std::bit_cast<uint64_t>(v); }
LWKD_INLINE Long4 bits_of(Double4 v) { return (Long4)v; }
LWKD_INLINE double from_bits(uint64_t v) { return std::bit_cast<double>(v); }
LWKD_INLINE Double4 from_bits(Long4 v) { return (Double4)v; }

// log(1+u) to 1e-10 in plain arithmetic; u > -1 (NaN and Inf give NaN).
template <typename V>
LWKD_INLINE V fast_log1p(V u) {
  const V y = 1 + u;
  const auto bits = bits_of(y);
  // The exponent of y/sqrt(1/2), biased by 1023, so that the mantissa lies in [0.707, 1.414).
  const auto biased = (bits - 0x3fe6a09e667f3bcdull + 0x3ff0000000000000ull) >> 52;
  const V mantissa = from_bits(bits - ((biased - 1023) << 52));
  const V exponent = from_bits(biased | 0x4330000000000000ull) - (0x1p52 + 1023);  // no conversion
  const V s = (exponent == 0 ? u : mantissa - 1) / (exponent == 0 ? 2 + u : mantissa + 1);
  const V z = s * s;
  const V series =
      1 + z * (1.0 / 3 + z * (1.0 / 5 + z * (1.0 / 7 + z * (1.0 / 9 + z * (1.0 / 11 + z / 13)))));
  const V value = exponent * 0.69314718055994530942 + 2 * s * series;
  const V nan = V{} + std::numeric_limits<double>::quiet_NaN();
  return y > 0 ? (y - y == 0 ? value : nan) : nan;
}

// log1p to the precision of the maps: A = double asks for the library's own.
template <typename A, typename V>
LWKD_INLINE V log1p_for(V u) {
  if constexpr (sizeof(A) == 4)
    return fast_log1p(u);
  else if constexpr (std::is_same_v<V, double>)
    return std::log1p(u);
  else {
    for (int k = 0; k < 4; ++k) u[k] = std::log1p(u[k]);
    return u;
  }
}

// (1+u)·log1p(u) − u, for u ≥ −1.
template <typename A, typename V>
LWKD_INLINE V f_of(V u) {
  const V tail = 1.0 / 30 + u * (-1.0 / 42 + u / 56);
  const V series = u * u * (0.5 + u * (-1.0 / 6 + u * (1.0 / 12 + u * (-1.0 / 20 + u * tail))));
  const V exact = u <= -1 ? V{} + 1 : (1 + u) * log1p_for<A>(u) - u;
  return power(u, One(1)) < kSeries ? series : exact;
}

// How one side's map becomes q (l2) or P (js): value = m · scale + shift.
struct Normal {
  double scale, shift;
  double norm;      // l2: ‖m‖; js: Σm
  double lift = 1;  // js: a power of two that keeps 1 / Σm finite where Σm is denormal
};

template <typename A>
LWKD_INLINE Normal normal_l2(const A* m, int64_t cells) {
  const double squares = sum_terms(cells, [&](auto v, int64_t q) LWKD_LAMBDA {
    v = read<decltype(v)>(m + q);
    return v * v;
  });
  const double norm = std::sqrt(squares);
  return {1 / (norm > kEps ? norm : norm <= kEps ? kEps : norm), 0, norm};
}

// `kept`: positions that count; an all-zero map is uniform over them.
template <typename A>
LWKD_INLINE Normal normal_js(const A* m, int64_t cells, int64_t kept) {
  const double total =
      sum_terms(cells, [&](auto v, int64_t q) LWKD_LAMBDA { return read<decltype(v)>(m + q); });
  if (total == 0) return {0, kept > 0 ? 1.0 / double(kept) : 0, 0};
  const double lift = total < 0x1p-1000 ? 0x1p200 : 1;
  return {1 / (total * lift), 0, total, lift};
}

template <typename A>
LWKD_INLINE double distance_l2(const A* s, const A* t, int64_t cells) {
  const Normal ns = normal_l2(s, cells), nt = normal_l2(t, cells);
  return sum_terms(cells, [&](auto v, int64_t q) LWKD_LAMBDA {
    using V = decltype(v);
    const V d = read<V>(s + q) * ns.scale - read<V>(t + q) * nt.scale;
    return d * d;
  });
}

// v at the positions that count, 0 elsewhere. `keep`: one byte a position, or null: all count.
template <typename V>
LWKD_INLINE V counted(V v, const uint8_t* keep, int64_t q) {
  if (keep == nullptr) return v;
  if constexpr (std::is_same_v<V, double>)
    return keep[q] == 0 ? 0 : v;
  else {
    for (int k = 0; k < 4; ++k) v[k] = keep[q + k] == 0 ? 0 : v[k];
    return v;
  }
}

template <typename V, typename A>
LWKD_INLINE V share(const Normal& n, const A* m, const uint8_t* keep, int64_t q) {
  return counted<V>(read<V>(m + q) * n.lift * n.scale + n.shift, keep, q);
}

template <typename A>
LWKD_INLINE double distance_js(const A* s, const A* t, int64_t cells, const uint8_t* keep,
                               int64_t kept, double beta) {
  const Normal ns = normal_js(s, cells, kept), nt = normal_js(t, cells, kept);
  return sum_terms(cells, [&](auto v, int64_t q) LWKD_LAMBDA {
    using V = decltype(v);
    const V ps = share<V>(ns, s, keep, q), pt = share<V>(nt, t, keep, q);
    const V delta = ps - pt, mix = beta * ps + (1 - beta) * pt;
    const V u = delta / (mix == 0 ? V{} + 1 : mix);
    return mix * (beta * f_of<A>((1 - beta) * u) + (1 - beta) * f_of<A>(-beta * u));
  });
}

// dD/dm of `m`, the other map held fixed, times `grad`; 0 where `keep` says so.
template <typename A>
LWKD_INLINE void gradient_l2(A* __restrict out, const A* m, const A* other, int64_t cells,
                             const uint8_t* keep, double grad) {
  const Normal n = normal_l2(m, cells), no = normal_l2(other, cells);
  const double radial = sum_terms(cells, [&](auto v, int64_t q) LWKD_LAMBDA {
    using V = decltype(v);
    const V own = read<V>(m + q) * n.scale;
    return own * 2 * (own - read<V>(other + q) * no.scale);
  });
  const double pull = n.norm <= kEps ? 0 : radial;  // below eps the norm is a constant
  for_each(cells, [&](auto v, int64_t q) LWKD_LAMBDA {
    using V = decltype(v);
    const V own = read<V>(m + q) * n.scale, g = 2 * (own - read<V>(other + q) * no.scale);
    write(counted<V>(grad * (g - own * pull) * n.scale, keep, q), out + q);
  });
}

template <typename A>
LWKD_INLINE void gradient_js(A* __restrict out, const A* m, const A* other, int64_t cells,
                             const uint8_t* keep, int64_t kept, double own, double grad) {
  const Normal n = normal_js(m, cells, kept), no = normal_js(other, cells, kept);
  // log(P/M) = −log1p((1−own)·(P_other − P)/P), exact where the two are nearly equal.
  const auto slope_of = [&](auto p, int64_t q) LWKD_LAMBDA {
    using V = decltype(p);
    const V u = (1 - own) * (share<V>(no, other, keep, q) - p) / (p == 0 ? V{} + 1 : p);
    return p == 0 ? V{} : -own * log1p_for<A>(u);
  };
  const double radial = sum_terms(cells, [&](auto v, int64_t q) LWKD_LAMBDA {
    const auto p = share<decltype(v)>(n, m, keep, q);
    return p * slope_of(p, q);
  });
  for_each(cells, [&](auto v, int64_t q) LWKD_LAMBDA {
    using V = decltype(v);
    const V d = grad * (slope_of(share<V>(n, m, keep, q), q) - radial) * n.scale;
    write(counted<V>(n.norm == 0 ? V{} : d, keep, q), out + q);
  });
}

}  // namespace lwkd
