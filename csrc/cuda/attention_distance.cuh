// From two maps of one sample to their distance, and back to the slope of either map. All of it in
// double: a norm of float maps overflows float, and the cost is that of one channel in C.
// A team of threads, a warp or a block, has one sample; thread i of it has positions i, i + team, …
// in every pass, so that it reads again only what it wrote or what was final before.
#pragma once

#include "common.cuh"

namespace lwkd::cuda {

constexpr double kEps = 1e-12;
constexpr double kSeries = 0.02;  // below this |u| the series of f is exact to rounding

// bool [N, *space] of any strides, or null.
struct Mask {
  const uint8_t* data;
  int64_t stride_n, stride[3];
};

struct Side {
  const void* raw;  // [splits, N, *size], or null where `map` needs no more than its mask
  void* map;        // [N, cells]
  int64_t splits, size[3];
};

struct DistanceItem {
  int64_t first;  // its first block
  Side side[2];
  int64_t space[3], cells;
  Mask mask;
  void* out;      // [N], or the layer's mean
  double* each;   // [N], where the mean is wanted
  int32_t* done;  // blocks that have finished, where the mean is wanted
  int32_t team, blocks;
};

struct SlopeItem {
  int64_t first;
  const void *own, *other;  // [N, cells]
  void* out;                // [N, positions]
  int64_t size[3], positions, space[3], cells;
  Mask mask;
  const void* grad;
  int64_t grad_stride;  // from sample to sample
  double weight;        // js: of the own side
  int32_t team;
};

// --- masks, pooling ------------------------------------------------------------------------------

struct Index3 {
  int64_t i[3];
};
__device__ __forceinline__ Index3 unravel(int64_t q, const int64_t (&size)[3]) {
  const int64_t rest = divide(q, size[2]), first = divide(rest, size[1]);
  return {{first, rest - first * size[1], q - rest * size[2]}};
}

__device__ __forceinline__ bool kept(const Mask& mask, int64_t n, int64_t q,
                                     const int64_t (&space)[3]) {
  if (mask.data == nullptr) return true;
  const Index3 at = unravel(q, space);
  return mask.data[n * mask.stride_n + at.i[0] * mask.stride[0] + at.i[1] * mask.stride[1] +
                   at.i[2] * mask.stride[2]] != 0;
}

// Adaptive average pooling: cell i of `out` covers [begin, end) of `in`. The other way round it
// gives the cells that hold a position: swap `in` and `out`.
__device__ __forceinline__ int64_t cell_begin(int64_t i, int64_t in, int64_t out) {
  return divide(i * in, out);
}
__device__ __forceinline__ int64_t cell_end(int64_t i, int64_t in, int64_t out) {
  return divide((i + 1) * in + out - 1, out);
}

// The parts of the channels add up, then the positions of a cell are averaged.
template <typename A>
__device__ __forceinline__ A settle(const Side& side, const int64_t (&space)[3], int64_t n,
                                    int64_t samples, int64_t q) {
  const int64_t positions = side.size[0] * side.size[1] * side.size[2];
  const A* raw = static_cast<const A*>(side.raw) + n * positions;
  const Index3 at = unravel(q, space);
  int64_t begin[3], end[3];
#pragma unroll
  for (int d = 0; d < 3; ++d) {
    begin[d] = cell_begin(at.i[d], side.size[d], space[d]);
    end[d] = cell_end(at.i[d], side.size[d], space[d]);
  }
  A sum = 0;
#pragma unroll 1
  for (int64_t a = begin[0]; a < end[0]; ++a) {
#pragma unroll 1
    for (int64_t b = begin[1]; b < end[1]; ++b) {
#pragma unroll 1
      for (int64_t c = begin[2]; c < end[2]; ++c) {
        const A* r = raw + (a * side.size[1] + b) * side.size[2] + c;
        A value = 0;
#pragma unroll 1
        for (int64_t part = 0; part < side.splits; ++part) value += r[part * samples * positions];
        sum += value;
      }
    }
  }
  return sum / static_cast<A>(end[0] - begin[0]) / static_cast<A>(end[1] - begin[1]) /
         static_cast<A>(end[2] - begin[2]);
}

// Makes one sample's maps final, where they are not yet.
template <typename A>
__device__ __forceinline__ void settle_maps(const DistanceItem& d, int64_t n, int64_t samples,
                                            int64_t cells) {
  if (d.mask.data == nullptr && d.side[0].raw == nullptr && d.side[1].raw == nullptr) return;
#pragma unroll 1
  for (int64_t q = threadIdx.x % d.team; q < cells; q += d.team) {
    const bool keep = kept(d.mask, n, q, d.space);
#pragma unroll 1
    for (int side = 0; side < 2; ++side) {
      A* map = static_cast<A*>(d.side[side].map) + n * d.cells + q;
      if (!keep)
        *map = 0;
      else if (d.side[side].raw != nullptr)
        *map = settle<A>(d.side[side], d.space, n, samples, q);
    }
  }
}

// --- what both directions know of a sample -------------------------------------------------------

// Two maps of one sample, `own` and `other`: student and teacher, or the one a slope is wanted of.
template <typename A, bool JS>
struct Pair {
  const A *own, *other;
  int64_t n, cells;  // cells: 0 for a team without a sample
  const int64_t (&space)[3];
  const Mask& mask;
  int team;
  // l2: 1/max(‖m‖, eps). js: Σm, and the share of a position kept where the map is all zero.
  double own_scale = 0, other_scale = 0, own_total = 0, other_total = 0, uniform = 0;
  bool constant = false;  // l2: the own norm is below eps
};

// Products of a map and its scale are rounded on their own: fused into the difference of two such
// products, equal maps would differ.
__device__ __forceinline__ double scaled(double m, double scale) { return __dmul_rn(m, scale); }

__device__ __forceinline__ double scale_of(double norm) {
  return 1 / (norm > kEps ? norm : norm <= kEps ? kEps : norm);
}

// Every thread of the block calls, with or without a sample.
template <typename A, bool JS>
__device__ __forceinline__ void measure(Pair<A, JS>& pair, double* shared) {
  const int lane = threadIdx.x % pair.team;
  double sums[2] = {0, 0};
#pragma unroll 4
  for (int64_t q = lane; q < pair.cells; q += pair.team) {
    const double m = pair.own[q], other = pair.other[q];
    sums[0] += JS ? m : m * m;
    sums[1] += JS ? other : other * other;
  }
  team_sum(sums, pair.team, shared);
  pair.own_total = sums[0];
  pair.other_total = sums[1];
  if constexpr (!JS) {
    const double norm = sqrt(sums[0]);
    pair.constant = norm <= kEps;
    pair.own_scale = scale_of(norm);
    pair.other_scale = scale_of(sqrt(sums[1]));
    return;
  }
  if (sums[0] != 0 && sums[1] != 0) return;
  double count[1] = {0};
#pragma unroll 1
  for (int64_t q = lane; q < pair.cells; q += pair.team)
    count[0] += kept(pair.mask, pair.n, q, pair.space);
  team_sum(count, pair.team, shared);
  pair.uniform = count[0] > 0 ? 1 / count[0] : 0;
}

// P = m/Σm of one position; an all-zero map is uniform over the positions kept.
template <typename A, bool JS>
__device__ __forceinline__ double share(const Pair<A, JS>& pair, const A* map, double total,
                                        int64_t q) {
  if (total != 0) return map[q] / total;
  return kept(pair.mask, pair.n, q, pair.space) ? pair.uniform : 0;
}

// --- distance ------------------------------------------------------------------------------------

// (1+u)·log1p(u) − u, for u ≥ −1.
__device__ __forceinline__ double f_of(double u) {
  if (fabs(u) < kSeries)
    return u * u * (0.5 + u * (-1.0 / 6 + u * (1.0 / 12 + u * (-1.0 / 20 + u / 30))));
  return u <= -1 ? 1.0 : (1 + u) * log1p(u) - u;
}

__device__ __forceinline__ double js_term(double ps, double pt, double beta) {
  const double delta = ps - pt, mix = beta * ps + (1 - beta) * pt;
  if (mix == 0) return 0;
  const double u = delta / mix;
  return mix * (beta * f_of((1 - beta) * u) + (1 - beta) * f_of(-beta * u));
}

// D[n] of one sample; every thread of the block calls, with or without a sample.
template <typename A, bool JS>
__device__ __forceinline__ double sample_distance(const DistanceItem& d, int64_t n, int64_t samples,
                                                  double beta, double* shared) {
  const int64_t cells = n < samples ? d.cells : 0;
  settle_maps<A>(d, n, samples, cells);
  Pair<A, JS> pair{static_cast<const A*>(d.side[0].map) + n * d.cells,
                   static_cast<const A*>(d.side[1].map) + n * d.cells,
                   n,
                   cells,
                   d.space,
                   d.mask,
                   d.team};
  measure(pair, shared);
  double distance[1] = {0};
  const int lane = threadIdx.x % d.team;
  if constexpr (JS) {
#pragma unroll 1
    for (int64_t q = lane; q < cells; q += d.team)
      distance[0] += js_term(share(pair, pair.own, pair.own_total, q),
                             share(pair, pair.other, pair.other_total, q), beta);
  } else {
#pragma unroll 4
    for (int64_t q = lane; q < cells; q += d.team) {
      const double difference =
          scaled(pair.own[q], pair.own_scale) - scaled(pair.other[q], pair.other_scale);
      distance[0] += difference * difference;
    }
  }
  team_sum(distance, d.team, shared);
  return distance[0];
}

// The block that finishes last adds its layer's samples, in one fixed order.
template <typename A>
__device__ __forceinline__ void finish_mean(const DistanceItem& d, int64_t samples,
                                            double* shared) {
  int* last = reinterpret_cast<int*>(shared);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *last = atomicAdd(d.done, 1) == d.blocks - 1;
  __syncthreads();
  if (*last == 0) return;
  __threadfence();
  double sum[1] = {0};
#pragma unroll 4
  for (int64_t n = threadIdx.x; n < samples; n += blockDim.x) sum[0] += __ldcg(d.each + n);
  team_sum(sum, blockDim.x, shared);
  if (threadIdx.x == 0) *static_cast<A*>(d.out) = static_cast<A>(sum[0] / samples);
}

// --- the way back: dD/dm -------------------------------------------------------------------------

// dD/dm at a cell before the part along m itself is taken off; `own` is q or P there.
template <typename A, bool JS>
__device__ __forceinline__ double bare_slope(const Pair<A, JS>& pair, double weight, int64_t q,
                                             double& own) {
  if (!JS) {
    own = scaled(pair.own[q], pair.own_scale);
    return 2 * (own - scaled(pair.other[q], pair.other_scale));
  }
  own = share(pair, pair.own, pair.own_total, q);
  if (own == 0) return 0;
  // log(P/M) = −log1p((1−w)·(P_other − P)/P), exact where the two are nearly equal.
  const double other = share(pair, pair.other, pair.other_total, q);
  return -weight * log1p((1 - weight) * (other - own) / own);
}

// Σ own · bare slope: the part along m, which normalising takes off.
template <typename A, bool JS>
__device__ __forceinline__ double radial_slope(const Pair<A, JS>& pair, double weight,
                                               double* shared) {
  double radial[1] = {0};
#pragma unroll(JS ? 1 : 4)
  for (int64_t q = threadIdx.x % pair.team; q < pair.cells; q += pair.team) {
    double own;
    const double bare = bare_slope(pair, weight, q, own);
    radial[0] += own * bare;
  }
  team_sum(radial, pair.team, shared);
  return pair.constant ? 0 : radial[0];  // below eps the norm is a constant
}

// dD/dm at a cell.
template <typename A, bool JS>
__device__ __forceinline__ double cell_slope(const Pair<A, JS>& pair, double weight, double radial,
                                             int64_t q) {
  if ((JS && pair.own_total == 0) || !kept(pair.mask, pair.n, q, pair.space)) return 0;
  double own;
  const double bare = bare_slope(pair, weight, q, own);
  return JS ? (bare - radial) / pair.own_total : (bare - own * radial) * pair.own_scale;
}

// The transpose of pooling: every cell that holds the raw position gives its part.
template <typename A, bool JS>
__device__ __forceinline__ double raw_slope(const Pair<A, JS>& pair, double weight, double radial,
                                            const int64_t (&size)[3], int64_t r) {
  const int64_t (&space)[3] = pair.space;
  const Index3 at = unravel(r, size);
  int64_t low[3], high[3];
#pragma unroll
  for (int d = 0; d < 3; ++d) {
    low[d] = cell_begin(at.i[d], space[d], size[d]);
    high[d] = cell_end(at.i[d], space[d], size[d]);
  }
  double sum = 0;
#pragma unroll 1
  for (int64_t i = low[0]; i < high[0]; ++i) {
#pragma unroll 1
    for (int64_t j = low[1]; j < high[1]; ++j) {
#pragma unroll 1
      for (int64_t k = low[2]; k < high[2]; ++k) {
        const int64_t shares = (cell_end(i, size[0], space[0]) - cell_begin(i, size[0], space[0])) *
                               (cell_end(j, size[1], space[1]) - cell_begin(j, size[1], space[1])) *
                               (cell_end(k, size[2], space[2]) - cell_begin(k, size[2], space[2]));
        const int64_t q = (i * space[1] + j) * space[2] + k;
        sum += cell_slope(pair, weight, radial, q) / static_cast<double>(shares);
      }
    }
  }
  return sum;
}

}  // namespace lwkd::cuda
