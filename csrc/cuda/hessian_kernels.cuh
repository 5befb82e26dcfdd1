// Kernels of the Hessian kind; lwkd/ops/hessian.py states the formulas.
//
//   signs_kernel   ±1
//   dot_kernel     Σ ±h over a block's elements, in float64: h is read once
//   total_kernel   the blocks of an item added up
//
// A warp has 4096 elements, whose signs are 32 blocks of Philox: every lane makes one, and all read
// them from shared memory. No sum's order depends on anything but shapes and alignment.
#pragma once

#include "../philox.h"
#include "table.cuh"

namespace lwkd::cuda {

constexpr int kElementDims = 8;  // merged where nothing lies between
constexpr int kWarps = kThreads / 32;
constexpr int64_t kWarpElements = 4096, kBlockElements = kWarps * kWarpElements;
constexpr int64_t kWordBytes = kWarps * 128 * 4;  // of shared memory: the words of a block's warps

// One tensor, or one probe's part of it: elements in their logical order.
struct Elements {
  void* data;
  int32_t dtype;
  bool dense;
  int64_t length;
  int64_t size[kElementDims],
      stride[kElementDims];  // innermost first; no index reaches the end of the outermost
};

struct ProbeItem {
  int64_t first;
  Elements x;
  Probe signs;
  double* out;  // a block's sum
};

struct TotalItem {
  int64_t first;
  const double* partial;
  int64_t count;
  void* out;
};

// What a warp has of an item; `words`: of its signs.
struct WarpShare {
  int64_t begin, count;
  int lane;
  const uint32_t* words;
};

__device__ __forceinline__ WarpShare warp_share(const ProbeItem& item, int64_t block,
                                                uint32_t* shared) {
  const int warp = threadIdx.x / 32;
  WarpShare s{};
  s.lane = threadIdx.x % 32;
  s.begin = block * kBlockElements + warp * kWarpElements;
  s.count = item.x.length > s.begin ? smaller(kWarpElements, item.x.length - s.begin) : 0;
  const PhiloxWords mine = item.signs.block(s.begin / 128 + s.lane);
#pragma unroll
  for (int w = 0; w < 4; ++w) shared[warp * 128 + s.lane * 4 + w] = mine.w[w];
  s.words = shared + warp * 128;
  __syncthreads();
  return s;
}

// Whether the sign of the warp's element q is +; of neighbours within 32, bit by bit.
__device__ __forceinline__ uint32_t bits_from(const WarpShare& s, int64_t q) {
  return s.words[q / 32] >> (q % 32);
}

__device__ __forceinline__ int64_t offset_of(const Elements& x, int64_t q) {
  int64_t at = 0;
#pragma unroll 1
  for (int d = 0;; ++d) {
    const bool last = q < x.size[d];
    const int64_t left = last ? 0 : divide(q, x.size[d]);
    at += (q - left * x.size[d]) * x.stride[d];
    if (last) return at;
    q = left;
  }
}

template <int K>
__global__ void __launch_bounds__(kThreads)
    dot_kernel(const __grid_constant__ Table<ProbeItem, K> table) {
  const ProbeItem& item = table.item[find(table, blockIdx.x)];
  const int64_t block = blockIdx.x - item.first;
  uint32_t* words = shared_memory<uint32_t>();
  const WarpShare share = warp_share(item, block, words);
  double sum[1] = {0};
  with_dtype<double>(item.x.dtype, [&](auto type) {
    using T = decltype(type);
    const T* data = static_cast<const T*>(item.x.data);
    if (!item.x.dense) {
      for (int64_t q = share.lane; q < share.count; q += 32) {
        const double x = widen(load(data + offset_of(item.x, share.begin + q)));
        sum[0] += bits_from(share, q) & 1 ? x : -x;
      }
      return;
    }
    constexpr int V = 16 / int(sizeof(T));
    data += share.begin;
    const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0;
    const int64_t packed = aligned ? share.count / V * V : 0;
#pragma unroll 4
    for (int64_t q = share.lane * V; q < packed; q += 32 * V) {
      double x[V];
      unpack<T, V>(load_pack<T, V>(data + q), x);
      const uint32_t bits = bits_from(share, q);
#pragma unroll
      for (int j = 0; j < V; ++j) sum[0] += bits >> j & 1 ? x[j] : -x[j];
    }
    for (int64_t q = packed + share.lane; q < share.count; q += 32) {
      const double x = widen(load(data + q));
      sum[0] += bits_from(share, q) & 1 ? x : -x;
    }
  });
  __syncthreads();  // the words are read
  team_sum(sum, kThreads, shared_memory<double>());
  if (threadIdx.x == 0) item.out[block] = sum[0];
}

template <int K>
__global__ void __launch_bounds__(kThreads)
    signs_kernel(const __grid_constant__ Table<ProbeItem, K> table) {
  const ProbeItem& item = table.item[find(table, blockIdx.x)];
  const WarpShare share = warp_share(item, blockIdx.x - item.first, shared_memory<uint32_t>());
  with_dtype<double>(item.x.dtype, [&](auto type) {
    using T = decltype(type);
    T* data = static_cast<T*>(item.x.data);
    for (int64_t q = share.lane; q < share.count; q += 32) {
      const int64_t e = share.begin + q;
      narrow(static_cast<Wide<T>>(bits_from(share, q) & 1 ? 1 : -1),
             data[item.x.dense ? e : offset_of(item.x, e)]);
    }
  });
}

// One block an item.
template <typename A, int K>
__global__ void __launch_bounds__(kThreads)
    total_kernel(const __grid_constant__ Table<TotalItem, K> table) {
  const TotalItem& item = table.item[find(table, blockIdx.x)];
  double sum[1] = {0};
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < item.count; i += kThreads) sum[0] += item.partial[i];
  team_sum(sum, kThreads, shared_memory<double>());
  if (threadIdx.x == 0) *static_cast<A*>(item.out) = static_cast<A>(sum[0]);
}

}  // namespace lwkd::cuda
