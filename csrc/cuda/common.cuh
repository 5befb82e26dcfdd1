// What every CUDA kernel shares: storage types, 16-byte packs, sums over a warp or a block. No
// torch and no CUDA runtime here: tests/cuda/emulation runs this very code on the host.
#pragma once

#include <cstdint>
#include <type_traits>

#ifdef LWKD_EMULATE
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace lwkd::cuda {

constexpr int kThreads = 256;  // a streaming block

// --- storage types -------------------------------------------------------------------------------

enum Dtype : int32_t { kFloat, kDouble, kHalf, kBFloat16 };

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

#ifndef LWKD_EMULATE
__device__ __forceinline__ float half_to_float(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}
__device__ __forceinline__ uint32_t two_halves(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return static_cast<uint32_t>(__half_as_ushort(both.x)) |
         static_cast<uint32_t>(__half_as_ushort(both.y)) << 16;
}
__device__ __forceinline__ uint32_t two_bfloat16s(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return static_cast<uint32_t>(__bfloat16_as_ushort(both.x)) |
         static_cast<uint32_t>(__bfloat16_as_ushort(both.y)) << 16;
}
#endif

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(Half x) { return half_to_float(x.bits); }
__device__ __forceinline__ float widen(BFloat16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}

__device__ __forceinline__ void narrow(double x, double& out) { out = x; }
__device__ __forceinline__ void narrow(float x, float& out) { out = x; }
__device__ __forceinline__ void narrow(float x, Half& out) {
  out.bits = static_cast<uint16_t>(two_halves(x, 0));
}
__device__ __forceinline__ void narrow(float x, BFloat16& out) {
  out.bits = static_cast<uint16_t>(two_bfloat16s(x, 0));
}

// Calls run(T{}) for the storage type. A call that computes in float holds no double.
template <typename A, typename Run>
__device__ __forceinline__ void with_dtype(int32_t dtype, const Run& run) {
  if (dtype == kFloat)
    run(float{});
  else if (dtype == kHalf)
    run(Half{});
  else if (dtype == kBFloat16)
    run(BFloat16{});
  else if constexpr (std::is_same_v<A, double>)
    run(double{});
}

// --- 16 bytes at a time --------------------------------------------------------------------------

struct alignas(16) Words {
  uint32_t word[4];
};

// V elements as they lie in memory: one, or 16 bytes of them.
template <typename T, int V>
using Pack = std::conditional_t<V == 1, T, Words>;

// Loads are of memory that no one writes during the launch.
__device__ __forceinline__ float load(const float* p) { return __ldg(p); }
__device__ __forceinline__ double load(const double* p) { return __ldg(p); }
__device__ __forceinline__ Half load(const Half* p) {
  return {__ldg(reinterpret_cast<const uint16_t*>(p))};
}
__device__ __forceinline__ BFloat16 load(const BFloat16* p) {
  return {__ldg(reinterpret_cast<const uint16_t*>(p))};
}
__device__ __forceinline__ Words load(const Words* p) {
  const uint4 v = __ldg(reinterpret_cast<const uint4*>(p));
  return {{v.x, v.y, v.z, v.w}};
}

template <typename T, int V>
__device__ __forceinline__ Pack<T, V> load_pack(const T* p) {
  return load(reinterpret_cast<const Pack<T, V>*>(p));
}
template <typename T, int V>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, V>& pack) {
  if constexpr (V == 1) {
    *p = pack;
  } else {
    *reinterpret_cast<uint4*>(p) =
        make_uint4(pack.word[0], pack.word[1], pack.word[2], pack.word[3]);
  }
}

template <typename T, int V, typename A>
__device__ __forceinline__ void unpack(const Pack<T, V>& pack, A (&out)[V]) {
  if constexpr (V == 1) {
    out[0] = widen(pack);
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if constexpr (std::is_same_v<T, double>) {
        out[j] = __hiloint2double(static_cast<int>(pack.word[2 * j + 1]),
                                  static_cast<int>(pack.word[2 * j]));
      } else if constexpr (std::is_same_v<T, float>) {
        out[j] = __uint_as_float(pack.word[j]);
      } else if constexpr (std::is_same_v<T, Half>) {
        out[j] = half_to_float(static_cast<uint16_t>(pack.word[j / 2] >> 16 * (j % 2)));
      } else {
        const uint32_t word = pack.word[j / 2];
        out[j] = __uint_as_float(j % 2 == 0 ? word << 16 : word & 0xffff0000u);
      }
    }
  }
}

template <typename T, int V, typename A>
__device__ __forceinline__ Pack<T, V> pack_up(const A (&in)[V]) {
  Pack<T, V> out;
  if constexpr (V == 1) {
    narrow(static_cast<Wide<T>>(in[0]), out);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (std::is_same_v<T, double>) {
        const double x = in[i / 2];
        out.word[i] = static_cast<uint32_t>(i % 2 == 0 ? __double2loint(x) : __double2hiint(x));
      } else if constexpr (std::is_same_v<T, float>) {
        out.word[i] = __float_as_uint(static_cast<float>(in[i]));
      } else {
        const float low = static_cast<float>(in[2 * i]), high = static_cast<float>(in[2 * i + 1]);
        out.word[i] = std::is_same_v<T, Half> ? two_halves(low, high) : two_bfloat16s(low, high);
      }
    }
  }
  return out;
}

// --- arithmetic ----------------------------------------------------------------------------------

// 64-bit division is a long routine, kept out of line; most operands fit 32 bits. a ≥ 0, b > 0.
static __device__ __noinline__ uint64_t divide_wide(uint64_t a, uint64_t b) { return a / b; }

__device__ __forceinline__ int64_t divide(int64_t a, int64_t b) {
  if (static_cast<uint64_t>(a | b) >> 32 == 0)
    return static_cast<int64_t>(static_cast<uint32_t>(a) / static_cast<uint32_t>(b));
  return static_cast<int64_t>(divide_wide(a, b));
}

template <typename T>
__device__ __forceinline__ T smaller(T a, T b) {
  return a < b ? a : b;
}

// --- sums, in one fixed order --------------------------------------------------------------------

// Over groups of `lanes` neighbours (a power of two); every lane of the warp calls, all get the
// sum.
template <typename A>
__device__ __forceinline__ A lanes_sum(A x, int lanes) {
#pragma unroll 1
  for (int mask = lanes / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
  return x;
}

// K sums over a team, which is a warp (team == 32) or the whole block; every thread calls and gets
// them. `shared` holds K doubles a warp.
template <int K>
__device__ __forceinline__ void team_sum(double (&x)[K], int team, double* shared) {
#pragma unroll
  for (int k = 0; k < K; ++k) x[k] = lanes_sum(x[k], 32);
  if (team == 32) return;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  __syncthreads();  // the sums of the last call are read
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int k = 0; k < K; ++k) shared[warp * K + k] = x[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < K; ++k) {
    x[k] = 0;
#pragma unroll 1
    for (int w = 0; w < warps; ++w) x[k] += shared[w * K + k];
  }
}

// Dynamic shared memory, as the launch sized it.
template <typename T>
__device__ __forceinline__ T* shared_memory() {
#ifdef LWKD_EMULATE
  return static_cast<T*>(emulator::shared_memory());
#else
  extern __shared__ uint4 lwkd_shared_memory[];
  return reinterpret_cast<T*>(lwkd_shared_memory);
#endif
}

}  // namespace lwkd::cuda
