// Sums over tiles of grams and of gradients, in double.
#pragma once

#include "jacobian.h"
#include "pieces.h"

namespace lwkd {
namespace {

using Sums = std::array<double, 3>;

// Of blocks P and Q of both grams, rows and columns of one block: 11, 12, 22.
template <typename Wide, typename A>
LWKD_INLINE void add_own(const A* const* p, const A* const* q, int64_t count, double* out) {
  sum_piece<3, Wide>(p[0], q[0], count, out, [&](auto v, int64_t i) LWKD_LAMBDA {
    using V = decltype(v);
    const V p11 = read<V>(p[0] + i), p12 = read<V>(p[1] + i), p22 = read<V>(p[2] + i);
    const V q11 = read<V>(q[0] + i), q12 = read<V>(q[1] + i), q22 = read<V>(q[2] + i);
    const V twelve = p12 * q12, eleven = p11 * q11, cross = p11 * q12;
    return std::array<V, 3>{eleven + 2 * twelve + p22 * q22, eleven + cross + twelve + p12 * q22,
                            eleven + 2 * cross + p11 * q22};
  });
}

// Of two blocks, each pair of which stands for two: 11, 12, 21, 22.
template <typename Wide, typename A>
LWKD_INLINE void add_cross(const A* const* p, const A* const* q, int64_t count, double* out) {
  sum_piece<3, Wide>(p[0], q[0], count, out, [&](auto v, int64_t i) LWKD_LAMBDA {
    using V = decltype(v);
    const V p11 = read<V>(p[0] + i), p12 = read<V>(p[1] + i);
    const V p21 = read<V>(p[2] + i), p22 = read<V>(p[3] + i);
    const V q11 = read<V>(q[0] + i), q12 = read<V>(q[1] + i);
    const V q21 = read<V>(q[2] + i), q22 = read<V>(q[3] + i);
    return std::array<V, 3>{2 * (p11 * q11 + p12 * q12 + p21 * q21 + p22 * q22),
                            p11 * (2 * q11 + q12 + q21) + p21 * (q21 + q22) + p12 * (q12 + q22),
                            2 * p11 * (q11 + q12 + q21 + q22)};
  });
}

template <typename Wide, typename A>
LWKD_INLINE void add_inner(const A* p, const A* q, int64_t count, double* out) {
  sum_piece<1, Wide>(p, q, count, out, [&](auto v, int64_t i) LWKD_LAMBDA {
    using V = decltype(v);
    return std::array<V, 1>{read<V>(p + i) * read<V>(q + i)};
  });
}

// u = first + second, and g: ‖u‖², ⟨u, g⟩, ‖g‖².
template <typename Wide, typename A>
LWKD_INLINE void add_halves(const A* first, const A* second, const A* g, int64_t count,
                            double* out) {
  sum_piece<3, Wide>(first, second, count, out, [&](auto v, int64_t i) LWKD_LAMBDA {
    using V = decltype(v);
    const V u = read<V>(first + i) + read<V>(second + i), own = read<V>(g + i);
    return std::array<V, 3>{u * u, u * own, own * own};
  });
}

#define LWKD_TILES(A)                                                                              \
  LWKD_WIDE_CLONES(void, own, (const A* const* p, const A* const* q, int64_t count, double* out),  \
                   (p, q, count, out), add_own<Wide>(p, q, count, out);)                           \
  LWKD_WIDE_CLONES(void, cross,                                                                    \
                   (const A* const* p, const A* const* q, int64_t count, double* out),             \
                   (p, q, count, out), add_cross<Wide>(p, q, count, out);)                         \
  LWKD_WIDE_CLONES(void, inner, (const A* p, const A* q, int64_t count, double* out),              \
                   (p, q, count, out), add_inner<Wide>(p, q, count, out);)                         \
  LWKD_WIDE_CLONES(                                                                                \
      void, two_halves, (const A* first, const A* second, const A* g, int64_t count, double* out), \
      (first, second, g, count, out), add_halves<Wide>(first, second, g, count, out);)             \
  LWKD_CLONES void add_product(const A* x, const A* y, int64_t y_stride, int64_t count,            \
                               double* to) {                                                       \
    if (y_stride == 1)                                                                             \
      for (int64_t i = 0; i < count; ++i) to[i] += double(x[i]) * double(y[i]);                    \
    else                                                                                           \
      for (int64_t i = 0; i < count; ++i) to[i] += double(x[i]) * double(y[i * y_stride]);         \
  }                                                                                                \
  LWKD_CLONES void add_to(const A* x, int64_t count, double* to) {                                 \
    for (int64_t i = 0; i < count; ++i) to[i] += x[i];                                             \
  }
LWKD_TILES(float)
LWKD_TILES(double)

// From G_S and G_T, both built in float64 or far enough apart: products of s, t as U = s − c·t.
Sums from_both(const double* products, How how, double c) {
  const double ss = products[0], tt = products[1], st = products[2];
  if (how == kNorms) return {ss, 0, 0};
  return {std::max(ss - 2 * c * st + c * c * tt, 0.0), ss - c * st, ss};
}

}  // namespace
}  // namespace lwkd
