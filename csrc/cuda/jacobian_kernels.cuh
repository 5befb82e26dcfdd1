// Kernels of Jacobian rows; lwkd/ops/jacobian.py states the formulas.
//
//   forward    sums_kernel     Σs², Σt², Σst (or Σ(s − t)²) of a piece of a row, each read once
//              finish_kernel   the pieces of every row added up, its distance, their mean
//   backward   mix_kernel      dx = own·x + other·y, one pass over both rows and dx
//
// Sums are float64, where products of float32 are exact. On a GPU with half as many float64 as
// float32 units that takes no longer than reading: of bfloat16 rows at 4 TB/s, 10¹² pairs a second
// want 3 fused products and 2 conversions each, an H200 does 17·10¹² and 3.6·10¹².
//
// All layers of a call share a launch; no sum's order depends on anything but shapes.
#pragma once

#include "table.cuh"

namespace lwkd::cuda {

constexpr int64_t kPiece = 16384;    // elements of a piece
constexpr int64_t kShortRow = 1024;  // rows up to here have a warp, others a block
constexpr int kDims = 6;             // of a row, merged where nothing lies between

enum Way : int32_t { kDifference, kNormalized, kNorms };

// Tensors of one shape [N, ...] walked together, in the order that the first one's memory has.
struct Rows {
  void* data[3];
  int64_t stride_n[3];
  int64_t stride[3][kDims];  // innermost first
  int64_t size[kDims];
  int32_t dtype[3];
  int32_t dims;
  bool dense, packed;  // one run of stride 1; and 16 bytes at a time, all of one type
  int64_t n, length, pieces;
};

struct SumItem {
  int64_t first;
  Rows rows;
  double* out;  // [N, pieces, 3]
};

struct FinishItem {
  int64_t first;
  const double *s, *t;  // the pieces' sums: of kNorms of each network, else both the same
  int64_t s_pieces, t_pieces;
  double* sums;  // [N, 3]
  void* out;     // [N], or one number
};

struct MixItem {
  int64_t first;
  Rows rows;  // x, dx, y
  const double* sums;
  const void* grad;
  int64_t grad_stride;
  int32_t side;
};

// --- elements ------------------------------------------------------------------------------------

__device__ __forceinline__ int64_t place(const Rows& r, int k, int64_t q) {
  if (r.dense) return q;
  int64_t at = 0;
#pragma unroll 1
  for (int d = 0; d + 1 < r.dims; ++d) {
    const int64_t left = divide(q, r.size[d]);
    at += (q - left * r.size[d]) * r.stride[k][d];
    q = left;
  }
  return at + q * r.stride[k][r.dims - 1];
}

template <typename A>
__device__ __forceinline__ double read(const Rows& r, int k, int64_t n, int64_t q) {
  double x = 0;
  with_dtype<A>(r.dtype[k], [&](auto tag) {
    using T = decltype(tag);
    x = widen(load(static_cast<const T*>(r.data[k]) + n * r.stride_n[k] + place(r, k, q)));
  });
  return x;
}

// A team's share of a row: one piece of it.
struct Share {
  int64_t n, begin, end;
  int lane, team;
};

__device__ __forceinline__ Share share_of(const Rows& r, int64_t block) {
  const int team = r.length <= kShortRow ? 32 : kThreads;
  const int64_t group = divide(block, r.pieces), piece = block - group * r.pieces;
  const int64_t n = group * (kThreads / team) + threadIdx.x / team;
  const int64_t begin = piece * kPiece;
  return {n, begin, n < r.n ? smaller(begin + kPiece, r.length) : begin,
          static_cast<int>(threadIdx.x % team), team};
}

// --- forward -------------------------------------------------------------------------------------

template <int WAY>
__device__ __forceinline__ void add(double (&sums)[3], double s, double t) {
  if constexpr (WAY == kDifference) {
    sums[0] += (s - t) * (s - t);
  } else {
    sums[0] += s * s;
    if constexpr (WAY == kNormalized) sums[1] += t * t, sums[2] += s * t;
  }
}

template <typename T, int V, int WAY>
__device__ __forceinline__ void packed_sums(const Rows& r, const Share& share, double (&sums)[3]) {
  const T* s = static_cast<const T*>(r.data[0]) + share.n * r.stride_n[0];
  const T* t = static_cast<const T*>(r.data[1]) + share.n * r.stride_n[1];
  constexpr int kAtOnce = 4;  // packs in flight
  const int64_t step = int64_t{share.team} * V;
#pragma unroll 1
  for (int64_t q = share.begin + share.lane * V; q < share.end; q += kAtOnce * step) {
    Pack<T, V> p[kAtOnce], o[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (q + i * step < share.end) {
        p[i] = load_pack<T, V>(s + q + i * step);
        if constexpr (WAY != kNorms) o[i] = load_pack<T, V>(t + q + i * step);
      }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (q + i * step < share.end) {
        Wide<T> a[V], b[V] = {};
        unpack<T, V>(p[i], a);
        if constexpr (WAY != kNorms) unpack<T, V>(o[i], b);
#pragma unroll
        for (int j = 0; j < V; ++j) add<WAY>(sums, a[j], b[j]);
      }
  }
}

template <typename A, int WAY, int K>
__global__ void __launch_bounds__(kThreads)
    sums_kernel(const __grid_constant__ Table<SumItem, K> table) {
  const SumItem& item = table.item[find(table, blockIdx.x)];
  const Rows& r = item.rows;
  const int64_t block = blockIdx.x - item.first;
  const Share share = share_of(r, block);
  double sums[3] = {0, 0, 0};
  if (r.packed) {
    with_dtype<A>(r.dtype[0], [&](auto tag) {
      using T = decltype(tag);
      packed_sums<T, 16 / sizeof(T), WAY>(r, share, sums);
    });
  } else {
#pragma unroll 1
    for (int64_t q = share.begin + share.lane; q < share.end; q += share.team)
      add<WAY>(sums, read<A>(r, 0, share.n, q), WAY == kNorms ? 0.0 : read<A>(r, 1, share.n, q));
  }
  team_sum(sums, share.team, shared_memory<double>());
  if (share.lane == 0 && share.n < r.n) {
    double* out = item.out + (share.n * r.pieces + share.begin / kPiece) * 3;
    for (int k = 0; k < 3; ++k) out[k] = sums[k];
  }
}

constexpr double kEps = 1e-12;

__device__ __forceinline__ double distance_of(const double (&sums)[3], int32_t way) {
  if (way == kDifference) return sums[0];
  const double ss = sums[0], tt = sums[1], st = sums[2];
  const double ns = sqrt(ss), nt = sqrt(tt);
  if (way == kNorms) {
    const double ratio = ns + nt == 0 ? 0 : (ns - nt) / (ns + nt);
    return ratio * ratio;
  }
  double d;
  if (ns >= kEps && nt >= kEps) {
    d = 2 - 2 * (st / sqrt(ss * tt));  // √(x·x) is x: of equal rows exactly 0
  } else {
    const double a = ns < kEps ? kEps : ns, b = nt < kEps ? kEps : nt;
    d = ss / (a * a) + tt / (b * b) - 2 * (st / a / b);
  }
  return d < 0 ? 0 : d;
}

// One block a layer.
template <typename A, int K>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const __grid_constant__ Table<FinishItem, K> table, int64_t samples, int32_t way,
                  bool mean) {
  const FinishItem& item = table.item[find(table, blockIdx.x)];
  double total[1] = {0};
#pragma unroll 1
  for (int64_t n = threadIdx.x; n < samples; n += kThreads) {
    double sums[3] = {0, 0, 0};
#pragma unroll 1
    for (int64_t i = 0; i < item.s_pieces; ++i) {
      const double* from = item.s + (n * item.s_pieces + i) * 3;
      sums[0] += from[0];
      if (way == kNormalized) sums[1] += from[1], sums[2] += from[2];
    }
    if (way == kNorms)
#pragma unroll 1
      for (int64_t i = 0; i < item.t_pieces; ++i) sums[1] += item.t[(n * item.t_pieces + i) * 3];
    for (int k = 0; k < 3; ++k) item.sums[n * 3 + k] = sums[k];
    const double d = distance_of(sums, way);
    total[0] += d;
    if (!mean) static_cast<A*>(item.out)[n] = static_cast<A>(d);
  }
  if (!mean) return;
  team_sum(total, kThreads, shared_memory<double>());
  if (threadIdx.x == 0) *static_cast<A*>(item.out) = static_cast<A>(total[0] / double(samples));
}

// --- backward ------------------------------------------------------------------------------------

// dD/d(own row) = own · row + other · other row.
struct Slope {
  double own, other;
};

__device__ __forceinline__ Slope slope_of(const double* sums, int32_t side, int32_t way) {
  if (way == kDifference) return {2, -2};
  const double ss = sums[side], tt = sums[1 - side], st = sums[2];
  const double ns = sqrt(ss), nt = sqrt(tt);
  if (way == kNorms) {
    const double whole = ns + nt;
    if (ns < kEps) return {0, 0};
    return {4 * (ns - nt) * nt / (whole * whole * whole) / ns, 0};
  }
  if (ns < kEps || nt < kEps) return {0, 0};
  const double scale = sqrt(ss * tt);
  return {2 * (st / scale) / ss, -2 / scale};
}

template <typename T, int V, bool PAIR>
__device__ __forceinline__ void packed_mix(const Rows& r, const Share& share, double own,
                                           double other) {
  const T* x = static_cast<const T*>(r.data[0]) + share.n * r.stride_n[0];
  T* dx = static_cast<T*>(r.data[1]) + share.n * r.stride_n[1];
  const T* y = static_cast<const T*>(r.data[2]) + share.n * r.stride_n[2];
  const bool none = own == 0 && other == 0;  // whatever the rows hold
#pragma unroll 2
  for (int64_t q = share.begin + share.lane * V; q < share.end; q += int64_t{share.team} * V) {
    Wide<T> a[V], b[V] = {}, d[V];
    unpack<T, V>(load_pack<T, V>(x + q), a);
    if constexpr (PAIR) unpack<T, V>(load_pack<T, V>(y + q), b);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      double sum = own * a[j];
      if constexpr (PAIR) sum += other * b[j];
      d[j] = none ? Wide<T>(0) : static_cast<Wide<T>>(sum);
    }
    store_pack<T, V>(dx + q, pack_up<T, V>(d));
  }
}

// `scale`: 1/N where the gradient is that of the mean. PAIR: the other row counts.
template <typename A, bool PAIR, int K>
__global__ void __launch_bounds__(kThreads)
    mix_kernel(const __grid_constant__ Table<MixItem, K> table, int32_t way, bool wide_grad,
               double scale) {
  const MixItem& item = table.item[find(table, blockIdx.x)];
  const Rows& r = item.rows;
  const Share share = share_of(r, blockIdx.x - item.first);
  if (share.n >= r.n) return;
  const int64_t at = share.n * item.grad_stride;
  const double g = scale * (wide_grad ? static_cast<const double*>(item.grad)[at]
                                      : static_cast<const float*>(item.grad)[at]);
  const Slope slope = slope_of(item.sums + share.n * 3, item.side, way);
  const double own = g * slope.own, other = g * slope.other;
  if (r.packed) {
    with_dtype<A>(r.dtype[0], [&](auto tag) {
      using T = decltype(tag);
      packed_mix<T, 16 / sizeof(T), PAIR>(r, share, own, other);
    });
    return;
  }
  const bool none = own == 0 && other == 0;
#pragma unroll 1
  for (int64_t q = share.begin + share.lane; q < share.end; q += share.team) {
    double d = own * read<A>(r, 0, share.n, q);
    if constexpr (PAIR) d += other * read<A>(r, 2, share.n, q);
    if (none) d = 0;
    with_dtype<A>(r.dtype[1], [&](auto tag) {
      using T = decltype(tag);
      T* to = static_cast<T*>(r.data[1]) + share.n * r.stride_n[1] + place(r, 1, q);
      narrow(static_cast<Wide<T>>(d), *to);
    });
  }
}

}  // namespace lwkd::cuda
