// Kernels of the attention kind; lwkd/ops/attention.py states the formulas.
//
//   forward    maps_kernel       Σ_c |x|^p of every operand of every layer, each read once
//              distance_kernel   pool, mask, normalise, compare: one team of threads a sample
//   backward   slope_kernel      dD/dm at every raw position, from the saved maps
//              spread_kernel     dx = slope · d|x|^p/dx, one pass over x and dx
//
// All layers of a call share a launch.
#pragma once

#include "attention_distance.cuh"
#include "attention_map.cuh"
#include "table.cuh"

namespace lwkd::cuda {

// Blocks of a multiprocessor: the powers people use leave 64 registers a thread.
template <typename A, typename P>
constexpr int kResident = sizeof(A) == 4 && P::kCommon ? 4 : 2;

template <typename A, typename P, int K>
__global__ void __launch_bounds__(kThreads, kResident<A, P>)
    maps_kernel(const __grid_constant__ Table<MapItem, K> table, P p, int32_t* done, int layers) {
  // The distances that follow in the stream count their blocks from zero.
  if (blockIdx.x == 0 && done != nullptr)
#pragma unroll 1
    for (int l = threadIdx.x; l < layers; l += kThreads) done[l] = 0;
  if (blockIdx.x >= table.blocks) return;
  const MapItem& item = table.item[find(table, blockIdx.x)];
  const int64_t block = blockIdx.x - item.first;
  with_dtype<A>(item.cut.dtype, [&](auto tag) {
    using T = decltype(tag);
    constexpr int V = kPack<T, A>;
    if (item.cut.order == kPlane) {
      if (item.cut.packed)
        plane_maps<T, V, A>(item, block, p);
      else
        plane_maps<T, 1, A>(item, block, p);
    } else {
      if (item.cut.packed)
        row_maps<T, V, A>(item, block, p);
      else
        row_maps<T, 1, A>(item, block, p);
    }
  });
}

constexpr int kDistanceThreads = 512;  // at most

template <typename A, bool JS, int K>
__global__ void __launch_bounds__(kDistanceThreads)
    distance_kernel(const __grid_constant__ Table<DistanceItem, K> table, int64_t samples,
                    double beta) {
  const DistanceItem& item = table.item[find(table, blockIdx.x)];
  double* shared = shared_memory<double>();
  const int teams = blockDim.x / item.team;
  const int64_t n = (blockIdx.x - item.first) * teams + threadIdx.x / item.team;
  const double distance = sample_distance<A, JS>(item, n, samples, beta, shared);
  if (threadIdx.x % item.team == 0 && n < samples) {
    if (item.each != nullptr)
      item.each[n] = distance;
    else
      static_cast<A*>(item.out)[n] = static_cast<A>(distance);
  }
  if (item.each != nullptr) finish_mean<A>(item, samples, shared);
}

// `factor`: p, over N where the gradient is that of the mean. POOLED: some items may be pooled;
// calls without them leave room for twice the threads.
template <typename A, bool JS, bool POOLED, int K>
__global__ void __launch_bounds__(kDistanceThreads, JS || POOLED ? 1 : 2)
    slope_kernel(const __grid_constant__ Table<SlopeItem, K> table, int64_t samples,
                 double factor) {
  const SlopeItem& item = table.item[find(table, blockIdx.x)];
  const int teams = blockDim.x / item.team, lane = threadIdx.x % item.team;
  const int64_t n = (blockIdx.x - item.first) * teams + threadIdx.x / item.team;
  Pair<A, JS> pair{static_cast<const A*>(item.own) + n * item.cells,
                   static_cast<const A*>(item.other) + n * item.cells,
                   n,
                   n < samples ? item.cells : 0,
                   item.space,
                   item.mask,
                   item.team};
  double* shared = shared_memory<double>();
  measure(pair, shared);
  const double radial = radial_slope(pair, item.weight, shared);
  if (n >= samples) return;
  const double grad = factor * static_cast<const A*>(item.grad)[n * item.grad_stride];
  A* out = static_cast<A*>(item.out) + n * item.positions;
  if (POOLED && item.positions != item.cells) {
#pragma unroll 1
    for (int64_t r = lane; r < item.positions; r += item.team)
      out[r] = static_cast<A>(grad * raw_slope(pair, item.weight, radial, item.size, r));
    return;
  }
#pragma unroll(JS || POOLED ? 1 : 4)
  for (int64_t r = lane; r < item.positions; r += item.team)
    out[r] = static_cast<A>(grad * cell_slope(pair, item.weight, radial, r));
}

template <typename A, typename P, int K>
__global__ void __launch_bounds__(kThreads, kResident<A, P>)
    spread_kernel(const __grid_constant__ Table<SpreadItem, K> table, P p) {
  const SpreadItem& item = table.item[find(table, blockIdx.x)];
  const int64_t block = blockIdx.x - item.first;
  with_dtype<A>(item.cut.dtype, [&](auto tag) {
    using T = decltype(tag);
    constexpr int V = kPack<T, A>;
    if (item.cut.order == kClear) {
      clear<T>(item, block);
    } else if (item.cut.order == kPlane) {
      if (item.cut.packed)
        plane_spread<T, V, A>(item, block, p);
      else
        plane_spread<T, 1, A>(item, block, p);
    } else {
      if (item.cut.packed)
        row_spread<T, V, A>(item, block, p);
      else
        row_spread<T, 1, A>(item, block, p);
    }
  });
}

}  // namespace lwkd::cuda
