// Kernels of Jacobian rows; lwkd/ops/jacobian.py states the formulas.
//
//   forward    sums_kernel       Σs², Σt², Σst (or Σ(s − t)²) of a piece of a row, each read once
//              distance_kernel   the pieces of every row added up, and its distance
//              mean_kernel       over the batch, where the mean is wanted
//   backward   mix_kernel        dx = own·x + other·y, one pass over both rows and dx
//
// Everything is float64, where products of float32 are exact. On a GPU with half as many float64 as
// float32 units that takes no longer than reading does. At 4.3 TB/s 1.1·10¹² pairs of bfloat16 come
// in a second: forward they want 2 conversions and 3 fused products each, 2.2 and 3.2·10¹², where
// an H200 does 3.7 (16 a clock and multiprocessor) and 15·10¹²; backward, six bytes an element,
// 3 conversions, 2.2·10¹². An A100 (2 TB/s; 2.4 and 4.9·10¹²) has the same to spare.
//
// All layers of a call share a launch; no sum's order depends on anything but shapes, strides and
// alignment.
#pragma once

#include "jacobian_rows.cuh"
#include "table.cuh"

namespace lwkd::cuda {

constexpr double kEps = 1e-12;  // what a shorter norm is replaced by

enum Way : int32_t { kDifference, kNormalized, kNorms };

// Sums of a row: of kNormalized all three, else the first.
template <int WAY>
constexpr int kTerms = WAY == kNormalized ? 3 : 1;

struct SumItem {
  int64_t first;
  Rows rows;
  double* out;    // [N, parts, terms], at this item's first part
  int64_t parts;  // of a row: its pieces, and those of other items of the same rows
};

struct DistanceItem {
  int64_t first;
  const double* partial[2];  // of kNorms those of either network, else the first
  int64_t parts[2];
  double* sums;   // [N, 3]
  void* out;      // [N]
  int32_t lanes;  // threads of a row
};

struct MixItem {
  int64_t first;
  Rows rows;  // x, dx and, where it counts, y
  const double* sums;
  const void* grad;
  int64_t grad_stride;  // from sample to sample
  int32_t side;
};

// --- forward -------------------------------------------------------------------------------------

// Fused by hand, so that equal rows have three equal sums.
template <int WAY>
__device__ __forceinline__ void add(double (&sum)[kTerms<WAY>], double s, double t) {
  if constexpr (WAY == kDifference) {
    const double d = s - t;
    sum[0] = fma(d, d, sum[0]);
  } else {
    sum[0] = fma(s, s, sum[0]);
    if constexpr (WAY == kNormalized) sum[1] = fma(t, t, sum[1]), sum[2] = fma(s, t, sum[2]);
  }
}

template <int WAY, typename S, typename T>
__device__ __forceinline__ void dense_sums(const S* s, const T* t, const Share& share, bool packs,
                                           double (&sum)[kTerms<WAY>]) {
  constexpr int V = kTogether<S, T>;
  using Own = Chunk<S, V>;
  using Other = Chunk<T, V>;
  constexpr int U = kInFlight<Own::kWords + (WAY == kNorms ? 0 : Other::kWords)>;
  walk<V, U>(
      share, packs ? head_of(s, t, share.count) : share.count,
      [&](int64_t q, int64_t step, int64_t end) {
        Own own[U];
        Other other[U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
          if (q + u * step < end) {
            own[u].read(s + q + u * step);
            if constexpr (WAY != kNorms) other[u].read(t + q + u * step);
          }
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
          if (q + u * step < end) {
            double a[V], b[V] = {};
            own[u].get(a);
            if constexpr (WAY != kNorms) other[u].get(b);
#pragma unroll
            for (int j = 0; j < V; ++j) add<WAY>(sum, a[j], b[j]);
          }
        }
      },
      [&](int64_t q) {
        add<WAY>(sum, widen(load(s + q)), WAY == kNorms ? 0.0 : double(widen(load(t + q))));
      });
}

template <int WAY, int K>
__global__ void __launch_bounds__(kThreads, 3)
    sums_kernel(const __grid_constant__ Table<SumItem, K> table) {
  const SumItem& item = table.item[find(table, blockIdx.x)];
  const Rows& r = item.rows;
  const Share share = share_of(r, blockIdx.x - item.first);
  double sum[kTerms<WAY>] = {};
  const bool done =
      r.dense && with_types<WAY != kNorms>(r.dtype[0], r.dtype[1], [&](auto s, auto t) {
        using S = decltype(s);
        using T = decltype(t);
        const S* own = begin_of<S>(r, 0, share);
        if constexpr (WAY == kNorms)
          dense_sums<WAY>(own, own, share, r.packs, sum);
        else
          dense_sums<WAY>(own, static_cast<const T*>(begin_of<T>(r, 1, share)), share, r.packs,
                          sum);
      });
  if (!done) {
#pragma unroll 1
    for (int64_t q = share.lane; q < share.count; q += share.team) {
      const Places p = places(r, share.n, share.begin + q);
      add<WAY>(sum, read(r, 0, p), WAY == kNorms ? 0.0 : read(r, 1, p));
    }
  }
  team_sum(sum, share.team, shared_memory<double>());
  if (share.lane != 0 || share.n >= r.n) return;
  double* out = item.out + (share.n * item.parts + share.piece) * kTerms<WAY>;
#pragma unroll
  for (int k = 0; k < kTerms<WAY>; ++k) out[k] = sum[k];
}

__device__ __forceinline__ double distance_of(const double (&sum)[3], int32_t way) {
  if (way == kDifference) return sum[0];
  const double ss = sum[0], tt = sum[1], st = sum[2];
  const double ns = sqrt(ss), nt = sqrt(tt);
  if (way == kNorms) {
    const double ratio = ns + nt == 0 ? 0 : (ns - nt) / (ns + nt);
    return ratio * ratio;
  }
  double d;  // of equal rows exactly 0 either way: √(x·x) is x, and x + x − 2x is 0
  if (ns >= kEps && nt >= kEps) {
    d = 2 - 2 * (st / sqrt(ss * tt));
  } else {
    const double a = ns < kEps ? kEps : ns, b = nt < kEps ? kEps : nt;
    d = ss / (a * a) + tt / (b * b) - 2 * (st / (a * b));
  }
  return d < 0 ? 0 : d;
}

template <typename A, int K>
__global__ void __launch_bounds__(kThreads)
    distance_kernel(const __grid_constant__ Table<DistanceItem, K> table, int64_t samples,
                    int32_t way) {
  const DistanceItem& item = table.item[find(table, blockIdx.x)];
  const int64_t n = (blockIdx.x - item.first) * (kThreads / item.lanes) + threadIdx.x / item.lanes;
  const int lane = threadIdx.x % item.lanes, terms = way == kNormalized ? 3 : 1;
  double sum[3] = {0, 0, 0};
  if (n < samples) {
    const double* own = item.partial[0] + n * item.parts[0] * terms;
#pragma unroll 4
    for (int64_t i = lane; i < item.parts[0]; i += item.lanes) {
      sum[0] += own[i * terms];
      if (way == kNormalized) sum[1] += own[i * terms + 1], sum[2] += own[i * terms + 2];
    }
    if (way == kNorms) {
      const double* other = item.partial[1] + n * item.parts[1];
#pragma unroll 4
      for (int64_t i = lane; i < item.parts[1]; i += item.lanes) sum[1] += other[i];
    }
  }
#pragma unroll
  for (int k = 0; k < 3; ++k) sum[k] = lanes_sum(sum[k], item.lanes);
  if (lane != 0 || n >= samples) return;
#pragma unroll
  for (int k = 0; k < 3; ++k) item.sums[n * 3 + k] = sum[k];
  static_cast<A*>(item.out)[n] = static_cast<A>(distance_of(sum, way));
}

// One block a layer.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    mean_kernel(const double* each, int64_t samples, A* out) {
  each += blockIdx.x * samples;
  double sum[1] = {0};
#pragma unroll 4
  for (int64_t n = threadIdx.x; n < samples; n += kThreads) sum[0] += each[n];
  team_sum(sum, kThreads, shared_memory<double>());
  if (threadIdx.x == 0) out[blockIdx.x] = static_cast<A>(sum[0] / double(samples));
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

// Times the incoming gradient. Roots and divisions of float64 are long: one warp does them for all.
__device__ __forceinline__ Slope team_slope(const MixItem& item, const Share& share, int32_t way,
                                            bool wide, double samples) {
  double* shared = shared_memory<double>();
  Slope slope{};
  if (share.n < item.rows.n && threadIdx.x % share.team < 32) {
    const int64_t at = share.n * item.grad_stride;
    const double g = (wide ? static_cast<const double*>(item.grad)[at]
                           : static_cast<const float*>(item.grad)[at]) /
                     samples;
    slope = slope_of(item.sums + share.n * 3, item.side, way);
    slope = {g * slope.own, g * slope.other};
  }
  if (share.team == 32) return slope;
  if (threadIdx.x == 0) shared[0] = slope.own, shared[1] = slope.other;
  __syncthreads();
  return {shared[0], shared[1]};
}

// Products are rounded on their own: fused into their sum, the gradient of equal rows would be what
// one rounding leaves. `none`: 0 whatever the rows hold.
template <bool PAIR>
struct Mix {
  double own, other;
  bool none;

  __device__ __forceinline__ double operator()(double x, double y) const {
    double d = __dmul_rn(own, x);
    if constexpr (PAIR) d += __dmul_rn(other, y);
    return none ? 0.0 : d;
  }
};

template <bool PAIR, typename X, typename Y>
__device__ __forceinline__ void dense_mix(const X* x, const Y* y, X* dx, const Share& share,
                                          const Mix<PAIR>& mix) {
  constexpr int V = kTogether<X, Y>;
  using Own = Chunk<X, V>;
  using Other = Chunk<Y, V>;
  constexpr int U = kInFlight<Own::kWords + (PAIR ? Other::kWords : 0)>;
  const int64_t head = head_of(x, y, share.count);
  walk<V, U>(
      share, on_word(dx + head) ? head : share.count,
      [&](int64_t q, int64_t step, int64_t end) {
        Own own[U];
        Other other[U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
          if (q + u * step < end) {
            own[u].read(x + q + u * step);
            if constexpr (PAIR) other[u].read(y + q + u * step);
          }
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
          if (q + u * step < end) {
            double a[V], b[V] = {};
            own[u].get(a);
            if constexpr (PAIR) other[u].get(b);
#pragma unroll
            for (int j = 0; j < V; ++j) a[j] = mix(a[j], b[j]);
            own[u].set(a);
            own[u].write(dx + q + u * step);
          }
        }
      },
      [&](int64_t q) {
        const double other = PAIR ? double(widen(load(y + q))) : 0.0;
        narrow(static_cast<Wide<X>>(mix(widen(load(x + q)), other)), dx[q]);
      });
}

// `samples`: N where the gradient is that of the mean, else 1. PAIR: the other row counts.
template <bool PAIR, int K>
__global__ void __launch_bounds__(kThreads, 3)
    mix_kernel(const __grid_constant__ Table<MixItem, K> table, int32_t way, bool wide_grad,
               double samples) {
  const MixItem& item = table.item[find(table, blockIdx.x)];
  const Rows& r = item.rows;
  const Share share = share_of(r, blockIdx.x - item.first);
  const Slope slope = team_slope(item, share, way, wide_grad, samples);
  const Mix<PAIR> mix{slope.own, slope.other, slope.own == 0 && slope.other == 0};
  const bool done =
      r.dense && with_types<PAIR>(r.dtype[0], r.dtype[2], [&](auto x, auto y) {
        using X = decltype(x);
        using Y = decltype(y);
        const X* own = begin_of<X>(r, 0, share);
        X* dx = begin_of<X>(r, 1, share);
        if constexpr (PAIR)
          dense_mix(own, static_cast<const Y*>(begin_of<Y>(r, 2, share)), dx, share, mix);
        else
          dense_mix(own, own, dx, share, mix);
      });
  if (done) return;
#pragma unroll 1
  for (int64_t q = share.lane; q < share.count; q += share.team) {
    const Places p = places(r, share.n, share.begin + q);
    const double d = mix(read(r, 0, p), PAIR ? read(r, 2, p) : 0.0);
    with_dtype<double>(r.dtype[1], [&](auto tag) {
      using T = decltype(tag);
      narrow(static_cast<Wide<T>>(d), static_cast<T*>(r.data[1])[p.at[1]]);
    });
  }
}

}  // namespace lwkd::cuda
