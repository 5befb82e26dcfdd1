// Storage types and the powers of |x|: what the CPU kernels load, compute and store.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

// A helper has to be inlined to become part of its caller's clone, lambdas too.
#define LWKD_INLINE inline __attribute__((always_inline))
#define LWKD_LAMBDA __attribute__((always_inline))

// One source, three instruction sets, chosen when the library is loaded. Sanitizers cannot run in
// the resolvers that this needs.
#if defined(__x86_64__) && !defined(LWKD_SANITIZE)
#define LWKD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LWKD_CLONES
#endif

namespace lwkd {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

LWKD_INLINE float widen(float x) { return x; }
LWKD_INLINE double widen(double x) { return x; }
LWKD_INLINE float widen(BFloat16 x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}
// Shifts and selects only, so that it becomes vector code below AVX-512 too.
LWKD_INLINE float widen(Half x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  const uint32_t finite = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
  const uint32_t bits = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite;
  return std::bit_cast<float>(bits | static_cast<uint32_t>(x.bits & 0x8000) << 16);
}

LWKD_INLINE void narrow(float x, float& out) { out = x; }
LWKD_INLINE void narrow(double x, double& out) { out = x; }
LWKD_INLINE void narrow(double x, float& out) { out = static_cast<float>(x); }
LWKD_INLINE void narrow(float x, double& out) { out = x; }
LWKD_INLINE void narrow(float x, BFloat16& out) {  // round to nearest even, NaN stays NaN
  const uint32_t u = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
  out.bits = static_cast<uint16_t>(nan ? (u >> 16) | 0x40u : rounded);
}
LWKD_INLINE void narrow(float x, Half& out) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  const uint32_t a = u & 0x7fffffffu;
  // Normal halves: rebias the exponent and round the 13 bits below to nearest even.
  const uint32_t normal = (a - (112u << 23) + 0xfffu + ((a >> 13) & 1u)) >> 13;
  // Subnormal ones: adding 0.5 lets the float unit do the rounding at the right bit.
  const uint32_t half = 0x3f000000u;
  const uint32_t tiny = std::bit_cast<uint32_t>(std::bit_cast<float>(a) + 0.5f) - half;
  const uint32_t huge = a > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t bits = a < 0x38800000u ? tiny : a >= 0x47800000u ? huge : normal;
  out.bits = static_cast<uint16_t>(bits | (u >> 16 & 0x8000u));
}
LWKD_INLINE void narrow(double x, BFloat16& out) { narrow(static_cast<float>(x), out); }
LWKD_INLINE void narrow(double x, Half& out) { narrow(static_cast<float>(x), out); }

// p as a type, so that the powers people use cost a multiplication.
struct One {
  explicit One(double) {}
};
struct Two {
  explicit Two(double) {}
};
struct Any {
  explicit Any(double value) : p(value) {}
  double p;
};

template <typename A>
LWKD_INLINE A power(A x, One) {
  return std::fabs(x);
}
template <typename A>
LWKD_INLINE A power(A x, Two) {
  return x * x;
}
template <typename A>
LWKD_INLINE A power(A x, Any e) {
  return std::pow(std::fabs(x), static_cast<A>(e.p));
}

// c · d|x|^p/dx, where c already holds the factor p; exactly 0 at x = 0 whatever c is.
template <typename A>
LWKD_INLINE A slope(A c, A x, One) {
  return x == 0 ? A(0) : x < 0 ? -c : c;  // c is NaN where x is
}
template <typename A>
LWKD_INLINE A slope(A c, A x, Two) {
  return x == 0 ? A(0) : c * x;
}
template <typename A>
LWKD_INLINE A slope(A c, A x, Any e) {
  return x == 0 ? A(0) : c * std::copysign(std::pow(std::fabs(x), static_cast<A>(e.p - 1)), x);
}

}  // namespace lwkd
