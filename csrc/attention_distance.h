// From two maps of one sample to their distance, and back to the gradient of either map. All of it
// in double: a norm of float32 maps overflows float32, and the cost is one channel in C.
#pragma once

#include "numeric.h"

namespace lwkd {

constexpr double kEps = 1e-12;
constexpr double kSeries = 0.02;  // below this |u| the series of f is exact to rounding
constexpr int kLanes = 8;         // partial sums of every reduction, in one fixed order

LWKD_INLINE double fold(const double* lane) {
  return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

// Σ term(q) over positions.
template <typename Term>
LWKD_INLINE double sum_terms(int64_t count, const Term& term) {
  double lane[kLanes] = {};
  int64_t q = 0;
  for (; q + kLanes <= count; q += kLanes)
    for (int k = 0; k < kLanes; ++k) lane[k] += term(q + k);
  for (int k = 0; q + k < count; ++k) lane[k] += term(q + k);
  return fold(lane);
}

// log1p to the precision of the maps: A = double asks for the library's own.
template <typename A>
LWKD_INLINE double log1p_for(double u) {
  if constexpr (sizeof(A) == 8)
    return std::log1p(u);
  else
    return fast_log1p(u);
}

// (1+u)·log1p(u) − u, for u ≥ −1.
template <typename A>
LWKD_INLINE double f_of(double u) {
  const double tail = 1.0 / 30 + u * (-1.0 / 42 + u / 56);
  const double series =
      u * u * (0.5 + u * (-1.0 / 6 + u * (1.0 / 12 + u * (-1.0 / 20 + u * tail))));
  const double exact = u <= -1 ? 1.0 : (1 + u) * log1p_for<A>(u) - u;
  return std::fabs(u) < kSeries ? series : exact;
}

// How one side's map becomes q (l2) or P (js): value = m · scale + shift.
struct Normal {
  double scale, shift;
  double norm;      // l2: ‖m‖; js: Σm
  double lift = 1;  // js: a power of two that keeps 1 / Σm finite where Σm is denormal
};

template <typename A>
LWKD_INLINE Normal normal_l2(const A* m, int64_t cells) {
  const double squares =
      sum_terms(cells, [&](int64_t q) LWKD_LAMBDA { return double(m[q]) * m[q]; });
  const double norm = std::sqrt(squares);
  return {1 / (norm > kEps ? norm : norm <= kEps ? kEps : norm), 0, norm};
}

// `kept`: positions that count; an all-zero map is uniform over them.
template <typename A>
LWKD_INLINE Normal normal_js(const A* m, int64_t cells, int64_t kept) {
  const double total = sum_terms(cells, [&](int64_t q) LWKD_LAMBDA { return double(m[q]); });
  if (total == 0) return {0, kept > 0 ? 1.0 / double(kept) : 0, 0};
  const double lift = total < 0x1p-1000 ? 0x1p200 : 1;
  return {1 / (total * lift), 0, total, lift};
}

template <typename A>
LWKD_INLINE double distance_l2(const A* s, const A* t, int64_t cells) {
  const Normal ns = normal_l2(s, cells), nt = normal_l2(t, cells);
  return sum_terms(cells, [&](int64_t q) LWKD_LAMBDA {
    const double d = s[q] * ns.scale - t[q] * nt.scale;
    return d * d;
  });
}

// `keep`: one byte a position, or null where all count.
template <typename A>
LWKD_INLINE double share(const Normal& n, const A* m, const uint8_t* keep, int64_t q) {
  return keep != nullptr && keep[q] == 0 ? 0.0 : m[q] * n.lift * n.scale + n.shift;
}

template <typename A>
LWKD_INLINE double distance_js(const A* s, const A* t, int64_t cells, const uint8_t* keep,
                               int64_t kept, double beta) {
  const Normal ns = normal_js(s, cells, kept), nt = normal_js(t, cells, kept);
  return sum_terms(cells, [&](int64_t q) LWKD_LAMBDA {
    const double ps = share(ns, s, keep, q), pt = share(nt, t, keep, q);
    const double delta = ps - pt, mix = beta * ps + (1 - beta) * pt;
    const double u = delta / (mix == 0 ? 1.0 : mix);
    return mix == 0 ? 0.0
                    : mix * (beta * f_of<A>((1 - beta) * u) + (1 - beta) * f_of<A>(-beta * u));
  });
}

// dD/dm of `m`, the other map held fixed, times `grad`; 0 where `keep` says so.
template <typename A>
LWKD_INLINE void gradient_l2(A* __restrict out, const A* m, const A* other, int64_t cells,
                             const uint8_t* keep, double grad) {
  const Normal n = normal_l2(m, cells), no = normal_l2(other, cells);
  const double radial = sum_terms(cells, [&](int64_t q) LWKD_LAMBDA {
    const double own = m[q] * n.scale;
    return own * 2 * (own - other[q] * no.scale);
  });
  const double pull = n.norm <= kEps ? 0 : radial;  // below eps the norm is a constant
  for (int64_t q = 0; q < cells; ++q) {
    const double own = m[q] * n.scale, g = 2 * (own - other[q] * no.scale);
    const double d = grad * (g - own * pull) * n.scale;
    out[q] = static_cast<A>(keep != nullptr && keep[q] == 0 ? 0 : d);
  }
}

template <typename A>
LWKD_INLINE void gradient_js(A* __restrict out, const A* m, const A* other, int64_t cells,
                             const uint8_t* keep, int64_t kept, double own, double grad) {
  const Normal n = normal_js(m, cells, kept), no = normal_js(other, cells, kept);
  // log(P/M) = −log1p((1−own)·(P_other − P)/P), exact where the two are nearly equal.
  const auto slope_of = [&](int64_t q) LWKD_LAMBDA {
    const double p = share(n, m, keep, q), po = share(no, other, keep, q);
    const double u = (1 - own) * (po - p) / (p == 0 ? 1.0 : p);
    return p == 0 ? 0.0 : -own * log1p_for<A>(u);
  };
  const double radial =
      sum_terms(cells, [&](int64_t q) LWKD_LAMBDA { return share(n, m, keep, q) * slope_of(q); });
  for (int64_t q = 0; q < cells; ++q) {
    const double d = n.norm == 0 ? 0 : grad * (slope_of(q) - radial) * n.scale;
    out[q] = static_cast<A>(keep != nullptr && keep[q] == 0 ? 0 : d);
  }
}

}  // namespace lwkd
