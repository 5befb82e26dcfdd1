// Vectors of a fixed number of lanes, so that sums have one order on every instruction set: the
// compiler lowers them to SSE2, AVX2 or AVX-512 as the clone asks.
#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "numeric.h"

namespace lwkd {

using Float8 = float __attribute__((vector_size(32)));
using Float4 = float __attribute__((vector_size(16)));
using Float2 = float __attribute__((vector_size(8)));
using Double2 = double __attribute__((vector_size(16)));
using Int8 = uint32_t __attribute__((vector_size(32)));
using Short8 = uint16_t __attribute__((vector_size(16)));
using Double4 = double __attribute__((vector_size(32)));
using Double8 = double __attribute__((vector_size(64)));
using Long4 = uint64_t __attribute__((vector_size(32)));

// The widest instruction set of this processor: 4 and 3 as in x86-64-v4 and -v3, else 0.
[[maybe_unused]] inline int level() {
#if defined(__x86_64__) && !defined(LWKD_SANITIZE)
  static const int found = [] {
    __builtin_cpu_init();
    return __builtin_cpu_supports("x86-64-v4") ? 4 : __builtin_cpu_supports("x86-64-v3") ? 3 : 0;
  }();
  return found;
#else
  return 0;
#endif
}

// A function in one version an instruction set, whose body sees as Wide the doubles of one
// register: sums of wider vectors would live in memory. Not by LWKD_CLONES, which has one body for
// all.
// clang-format off
#define LWKD_WIDE(Vector, type, name, parameters, ...) \
  [[maybe_unused]] type name parameters {              \
    using Wide = Vector;                               \
    __VA_ARGS__                                        \
  }
#if defined(__x86_64__) && !defined(LWKD_SANITIZE)
#define LWKD_WIDE_CLONES(type, name, parameters, arguments, ...)                        \
  __attribute__((target("arch=x86-64-v4")))                                             \
  LWKD_WIDE(Double8, type, name##_v4, parameters, __VA_ARGS__)                          \
  __attribute__((target("arch=x86-64-v3")))                                             \
  LWKD_WIDE(Double4, type, name##_v3, parameters, __VA_ARGS__)                          \
  LWKD_WIDE(Double2, type, name##_v2, parameters, __VA_ARGS__)                          \
  [[maybe_unused]] inline type name parameters {                                        \
    switch (level()) {                                                                  \
      case 4: return name##_v4 arguments;                                               \
      case 3: return name##_v3 arguments;                                               \
      default: return name##_v2 arguments;                                              \
    }                                                                                   \
  }
#else
#define LWKD_WIDE_CLONES(type, name, parameters, arguments, ...) \
  LWKD_WIDE(Double4, type, name, parameters, __VA_ARGS__)
#endif
// clang-format on

template <int kCount>
using Floats =
    std::conditional_t<kCount == 8, Float8, std::conditional_t<kCount == 4, Float4, Float2>>;
template <typename V>
constexpr int kLanes = sizeof(V) / sizeof(double);

template <typename A>
struct Lanes;
template <>
struct Lanes<float> {
  using Vector = Float8;
  static constexpr int kCount = 8;
};
template <>
struct Lanes<double> {
  using Vector = Double4;
  static constexpr int kCount = 4;
};

template <typename Vector, typename From>
LWKD_INLINE Vector read_bits(const From* p) {
  Vector v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

LWKD_INLINE Float8 load(const float* p) { return read_bits<Float8>(p); }
LWKD_INLINE Double4 load(const double* p) { return read_bits<Double4>(p); }
LWKD_INLINE Float8 load(const BFloat16* p) {
  return (Float8)(__builtin_convertvector(read_bits<Short8>(p), Int8) << 16);
}
LWKD_INLINE Float8 load(const Half* p) {  // as widen(Half)
  const Int8 bits = __builtin_convertvector(read_bits<Short8>(p), Int8);
  const Int8 magnitude = (bits & 0x7fffu) << 13;
  const Int8 finite = (Int8)((Float8)magnitude * 0x1p112f);
  const Int8 special = (Int8)(magnitude >= 0x0f800000u);
  return (Float8)(((special & (magnitude | 0x7f800000u)) | (~special & finite)) |
                  ((bits & 0x8000u) << 16));
}

template <typename Vector, typename To>
LWKD_INLINE void write_bits(Vector v, To* p) {
  std::memcpy(p, &v, sizeof(v));
}

// To an address of 16 bytes alignment, without the cache; before others may look, fence_past().
LWKD_INLINE void write_past(Float4 v, float* p) {
#if defined(__SSE2__)
  _mm_stream_ps(p, v);
#else
  write_bits(v, p);
#endif
}
LWKD_INLINE void write_past(Float8 v, float* p) {
  write_past(__builtin_shufflevector(v, v, 0, 1, 2, 3), p);
  write_past(__builtin_shufflevector(v, v, 4, 5, 6, 7), p + 4);
}
LWKD_INLINE void write_past(Float2 v, float* p) { write_bits(v, p); }
LWKD_INLINE void fence_past() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

LWKD_INLINE void store(Float8 v, float* p) { write_bits(v, p); }
LWKD_INLINE void store(Double4 v, double* p) { write_bits(v, p); }
LWKD_INLINE void store(Float8 v, BFloat16* p) {  // as narrow(float, BFloat16)
  const Int8 u = (Int8)v;
  const Int8 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const Int8 nan = (Int8)((u & 0x7fffffffu) > 0x7f800000u);
  const Int8 bits = (nan & ((u >> 16) | 0x40u)) | (~nan & rounded);
  write_bits(__builtin_convertvector(bits, Short8), p);
}
LWKD_INLINE void store(Float8 v, Half* p) {  // as narrow(float, Half)
  const Int8 u = (Int8)v, a = u & 0x7fffffffu;
  const Int8 normal = (a - (112u << 23) + 0xfffu + ((a >> 13) & 1u)) >> 13;
  const Int8 tiny = (Int8)((Float8)a + 0.5f) - 0x3f000000u;
  const Int8 nan = (Int8)(a > 0x7f800000u);
  const Int8 huge = (nan & 0x7e00u) | (~nan & 0x7c00u);
  const Int8 is_tiny = (Int8)(a < 0x38800000u), is_huge = (Int8)(a >= 0x47800000u);
  const Int8 bits = (is_tiny & tiny) | (is_huge & huge) | (~(is_tiny | is_huge) & normal);
  write_bits(__builtin_convertvector(bits | ((u >> 16) & 0x8000u), Short8), p);
}

LWKD_INLINE Float8 power(Float8 x, One) { return (Float8)((Int8)x & 0x7fffffffu); }
LWKD_INLINE Double4 power(Double4 x, One) { return (Double4)((Long4)x & 0x7fffffffffffffffull); }
LWKD_INLINE Float8 power(Float8 x, Two) { return x * x; }
LWKD_INLINE Double4 power(Double4 x, Two) { return x * x; }
LWKD_INLINE Float8 power(Float8 x, Any e) {
  for (int k = 0; k < 8; ++k) x[k] = power(x[k], e);
  return x;
}
LWKD_INLINE Double4 power(Double4 x, Any e) {
  for (int k = 0; k < 4; ++k) x[k] = power(x[k], e);
  return x;
}

// c · d|x|^p/dx, as slope() of one number.
LWKD_INLINE Float8 slope(Float8 c, Float8 x, Two) {
  return (Float8)((Int8)(c * x) & (Int8)(x != 0));
}
LWKD_INLINE Double4 slope(Double4 c, Double4 x, Two) {
  return (Double4)((Long4)(c * x) & (Long4)(x != 0));
}
LWKD_INLINE Float8 slope(Float8 c, Float8 x, One) {
  return (Float8)(((Int8)c ^ ((Int8)x & 0x80000000u)) & (Int8)(x != 0));
}
LWKD_INLINE Double4 slope(Double4 c, Double4 x, One) {
  return (Double4)(((Long4)c ^ ((Long4)x & 0x8000000000000000ull)) & (Long4)(x != 0));
}
LWKD_INLINE Float8 slope(Float8 c, Float8 x, Any e) {
  for (int k = 0; k < 8; ++k) x[k] = slope(c[k], x[k], e);
  return x;
}
LWKD_INLINE Double4 slope(Double4 c, Double4 x, Any e) {
  for (int k = 0; k < 4; ++k) x[k] = slope(c[k], x[k], e);
  return x;
}

// One fixed tree, by halves.
LWKD_INLINE float total(Float8 v) {
  const Float4 four =
      __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
  const Float4 two = four + __builtin_shufflevector(four, four, 2, 3, 0, 1);
  return two[0] + two[1];
}
LWKD_INLINE double total(Double4 v) {
  const Double2 two = __builtin_shufflevector(v, v, 0, 1) + __builtin_shufflevector(v, v, 2, 3);
  return two[0] + two[1];
}

// 16 partial sums, of whatever width, by one tree: lanes q and q + 4, then these of both halves.
LWKD_INLINE double total(const Double8* v) {
  const Double8 one = v[0], other = v[1];
  const auto halves = [](Double8 x) LWKD_LAMBDA {
    return __builtin_shufflevector(x, x, 0, 1, 2, 3) + __builtin_shufflevector(x, x, 4, 5, 6, 7);
  };
  return total(halves(one) + halves(other));
}
LWKD_INLINE double total(const Double4* v) { return total((v[0] + v[1]) + (v[2] + v[3])); }
LWKD_INLINE double total(const Double2* v) {
  const Double2 low = (v[0] + v[2]) + (v[4] + v[6]), high = (v[1] + v[3]) + (v[5] + v[7]);
  const Double2 two = low + high;
  return two[0] + two[1];
}

// As doubles: one instruction, where __builtin_convertvector takes three.
LWKD_INLINE Double2 doubles(Float2 x) { return Double2{x[0], x[1]}; }
LWKD_INLINE Double4 doubles(Float4 x) { return Double4{x[0], x[1], x[2], x[3]}; }
LWKD_INLINE Double8 doubles(Float8 x) {
  return Double8{x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]};
}

// As double, one (V = double) or as many as V has, whichever A is.
template <typename V, typename A>
LWKD_INLINE V read(const A* m) {
  if constexpr (std::is_same_v<V, double>)
    return *m;
  else if constexpr (std::is_same_v<A, float>)
    return doubles(read_bits<Floats<kLanes<V>>>(m));
  else
    return read_bits<V>(m);
}

template <typename V, typename A>
LWKD_INLINE void write(V v, A* m) {
  if constexpr (std::is_same_v<V, double>)
    *m = static_cast<A>(v);
  else if constexpr (std::is_same_v<A, float>)
    write_bits(__builtin_convertvector(v, Floats<kLanes<V>>), m);
  else
    write_bits(v, m);
}

constexpr int64_t kAhead = 8192;  // bytes: one stream, read so far ahead, is as fast as memory

template <int kElements, typename T>
LWKD_INLINE void read_ahead(const T* row) {
  const char* ahead = reinterpret_cast<const char*>(row) + kAhead;
  for (size_t line = 0; line < kElements * sizeof(T); line += 64) __builtin_prefetch(ahead + line);
}

}  // namespace lwkd
