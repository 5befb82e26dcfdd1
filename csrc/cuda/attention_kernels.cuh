// Kernels of the attention kind; lwkd/ops/attention.py states the formulas.
//
//   forward    maps_kernel       Σ_c |x|^p of every operand of every layer, each read once
//              distance_kernel   pool, mask, normalise, compare: one team of threads a sample
//   backward   slope_kernel      dD/dm at every raw position, from the saved maps
//              spread_kernel     dx = slope · d|x|^p/dx, one pass over x and dx
//
// All layers of a call share a launch. What a block works on stands in a table that is itself a
// kernel parameter: nothing is copied to the device and a captured graph keeps it.
#pragma once

#include "common.cuh"

namespace lwkd::cuda {

constexpr double kEps = 1e-12;
constexpr double kSeries = 0.02;  // below this |u| the series of f is exact to rounding

// --- tables --------------------------------------------------------------------------------------

// How a kernel walks an operand: positions side by side, channels side by side, or plain zeros.
enum Order : int32_t { kPlane, kRows, kClear };

// How one operand is cut into blocks; attention_plan.cuh makes it.
struct Cut {
  int64_t tiles;   // kPlane: tiles of positions in a sample
  int64_t splits;  // parts that the channels fall into
  int64_t chunk;   // length of a part: periods (kPlane), packs (kRows)
  int64_t period;  // kPlane: packs until the same positions come again
  int64_t total;   // packs of a sample (kPlane) or of a row (kRows)
  int32_t width;   // threads side by side along memory
  int32_t groups;  // kPlane: threads that share a position, each with its own channels
  int32_t count;   // samples (kPlane), rows (kRows) or elements (kClear) of a block
  int32_t order;
  int32_t dtype;
  int32_t packed;  // 16 bytes a load, or one element
};

// Positions in memory: the last dimension, or all of them where they form one run.
struct Space {
  int64_t length, middle;
  int64_t stride[3];
};

struct Walk {  // one tensor's way through memory, in elements
  int64_t stride_n;
  int64_t step;  // kPlane: from one period to the next; kClear: channel stride
  Space space;
};

struct MapItem {
  int64_t first;  // its first block
  Cut cut;
  const void* x;
  void* out;  // [splits, N, positions]
  int64_t n, positions;
  Walk walk;
};

struct SpreadItem {
  int64_t first;
  Cut cut;
  const void* x;
  void* dx;
  const void* slope;  // [N, positions]
  int64_t n, positions;
  Walk from, to;
};

// bool [N, *space] of any strides, or null.
struct Mask {
  const uint8_t* data;
  int64_t stride_n, stride[3];
};

struct Side {
  const void* raw;  // [splits, N, *size], or null where `map` is already what it should be
  void* map;        // [N, cells]
  int64_t splits, size[3];
};

struct DistanceItem {
  int64_t first;
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

template <typename Item, int K>
struct Table {
  int64_t blocks;
  int32_t count;
  Item item[K];
};

// The item that a block belongs to.
template <typename Item, int K>
__device__ __forceinline__ int find(const Table<Item, K>& table, int64_t block) {
  int low = 0, high = table.count;
#pragma unroll 1
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.item[middle].first <= block)
      low = middle;
    else
      high = middle;
  }
  return low;
}

__device__ __forceinline__ int64_t offset_of(const Space& s, int64_t q) {
  if (q < s.length) return q * s.stride[2];
  const int64_t run = divide(q, s.length), outer = divide(run, s.middle);
  return outer * s.stride[0] + (run - outer * s.middle) * s.stride[1] +
         (q - run * s.length) * s.stride[2];
}

// --- powers: the ones people use cost a multiplication -------------------------------------------

struct One {
  static constexpr int kLoads = 8, kStores = 4;  // packs in flight
};
struct Two {
  static constexpr int kLoads = 8, kStores = 4;
};
struct Any {
  static constexpr int kLoads = 2, kStores = 1;
  double p;
};

template <typename A>
__device__ __forceinline__ A power(A x, One) {
  return fabs(x);
}
template <typename A>
__device__ __forceinline__ A power(A x, Two) {
  return x * x;
}
template <typename A>
__device__ __forceinline__ A power(A x, Any any) {
  return pow(fabs(x), static_cast<A>(any.p));
}

// c · d|x|^p/dx, where c already holds the factor p; exactly 0 at x = 0 whatever c is.
template <typename A>
__device__ __forceinline__ A slope(A c, A x, One) {
  return x > 0 ? c : x < 0 ? -c : x * 0;  // x * 0 keeps a NaN
}
template <typename A>
__device__ __forceinline__ A slope(A c, A x, Two) {
  return x == 0 ? A(0) : c * x;
}
template <typename A>
__device__ __forceinline__ A slope(A c, A x, Any any) {
  return x == 0 ? A(0) : c * copysign(pow(fabs(x), static_cast<A>(any.p - 1)), x);
}

// --- maps ----------------------------------------------------------------------------------------

template <int U, int V, typename T, typename A, typename P>
__device__ __forceinline__ void add_packs(A (&sum)[V], const T* x, int64_t stride, P p) {
  Pack<T, V> pack[U];
#pragma unroll
  for (int u = 0; u < U; ++u) pack[u] = load_pack<T, V>(x + u * stride);
#pragma unroll
  for (int u = 0; u < U; ++u) {
    A value[V];
    unpack<T, V>(pack[u], value);
#pragma unroll
    for (int j = 0; j < V; ++j) sum[j] += power(value[j], p);
  }
}

// sum[j] += Σ_i |x[i·stride + j]|^p for i < count.
template <int V, typename T, typename A, typename P>
__device__ __forceinline__ void accumulate(A (&sum)[V], const T* x, int64_t stride, int64_t count,
                                           P p) {
#pragma unroll 1
  for (; count >= P::kLoads; count -= P::kLoads, x += P::kLoads * stride)
    add_packs<P::kLoads, V>(sum, x, stride, p);
  if constexpr (P::kLoads > 4) {
    if (count >= 4) add_packs<4, V>(sum, x, stride, p), count -= 4, x += 4 * stride;
    if (count >= 2) add_packs<2, V>(sum, x, stride, p), count -= 2, x += 2 * stride;
  }
  if (count >= 1) add_packs<1, V>(sum, x, stride, p);
}

// The packs of one thread: column, then every `groups`-th period of its part.
struct Spot {
  int64_t part, first_sample, column;
  int64_t sample, begin, count;
  bool active;
};

__device__ __forceinline__ Spot find_spot(const Cut& cut, int64_t n, int64_t block) {
  Spot s;
  const int64_t rest = divide(block, cut.splits), batch = divide(rest, cut.tiles);
  const int t = threadIdx.x, group = t / cut.width % cut.groups;
  s.part = block - rest * cut.splits;
  s.first_sample = batch * cut.count;
  s.column = (rest - batch * cut.tiles) * cut.width + t % cut.width;
  const int64_t slot = t / (cut.width * cut.groups);
  s.sample = s.first_sample + slot;
  s.active = slot < cut.count && s.sample < n && s.column < cut.period;
  s.begin = s.part * cut.chunk + group;
  s.count = 0;
  if (s.active && s.column < cut.total) {
    const int64_t periods = divide(cut.total - s.column + cut.period - 1, cut.period);
    const int64_t end = smaller((s.part + 1) * cut.chunk, periods);
    if (s.begin < end) s.count = divide(end - s.begin + cut.groups - 1, cut.groups);
  }
  return s;
}

// Positions side by side. A thread keeps its V positions through all of its channels. Where a
// channel is no whole number of packs, the packs return to the same positions after a few channels.
template <typename T, int V, typename A, typename P>
__device__ __forceinline__ void plane_maps(const MapItem& m, int64_t block, P p) {
  const Cut& cut = m.cut;
  const Spot s = find_spot(cut, m.n, block);
  A sum[V] = {};
  if (s.count > 0) {
    const T* x = static_cast<const T*>(m.x) + s.sample * m.walk.stride_n +
                 offset_of(m.walk.space, s.column * V) + s.begin * m.walk.step;
    accumulate<V>(sum, x, cut.groups * m.walk.step, s.count, p);
  }
  A* shared = shared_memory<A>();  // [count, groups, width, V]
  const int t = threadIdx.x;
#pragma unroll
  for (int j = 0; j < V; ++j) shared[t * V + j] = sum[j];
  __syncthreads();
  const int64_t column = s.column - t % cut.width;
  const int span = static_cast<int>(smaller<int64_t>(cut.width, cut.period - column)) * V;
  const int length = static_cast<int>(smaller<int64_t>(span, m.positions));  // positions of a tile
  const int samples = static_cast<int>(smaller<int64_t>(cut.count, m.n - s.first_sample));
  A* out = static_cast<A*>(m.out) + (s.part * m.n + s.first_sample) * m.positions + column * V;
#pragma unroll 1
  for (int i = t; i < samples * length; i += kThreads) {
    const int sample = i / length, q = i % length;
    A all = 0;
#pragma unroll 1
    for (int group = 0; group < cut.groups; ++group) {
      const A* row = shared + (sample * cut.groups + group) * cut.width * V;
#pragma unroll 1
      for (int e = q; e < span; e += length) all += row[e];
    }
    out[sample * m.positions + q] = all;
  }
}

// Where a row, a position of a sample, lies; the next row of the same thread is `jump` further.
struct Row {
  int64_t row, sample, q, jump_sample;
  int64_t positions, jump_q;
  int jump;

  __device__ __forceinline__ Row(int64_t first, int64_t all, int rows_at_once)
      : row(first), positions(all), jump(rows_at_once) {
    sample = divide(first, all);
    q = first - sample * all;
    jump_sample = divide(rows_at_once, all);
    jump_q = rows_at_once - jump_sample * all;
  }
  __device__ __forceinline__ void next() {
    row += jump;
    sample += jump_sample;
    q += jump_q;
    if (q >= positions) q -= positions, ++sample;
  }
};

// Channels side by side: `width` neighbours read one row and add their sums.
template <typename T, int V, typename A, typename P>
__device__ __forceinline__ void row_maps(const MapItem& m, int64_t block, P p) {
  const Cut& cut = m.cut;
  const int64_t rest = divide(block, cut.splits), part = block - rest * cut.splits;
  const int64_t rows = m.n * m.positions;
  const int lane = threadIdx.x % cut.width, at_once = kThreads / cut.width;
  const int64_t begin = part * cut.chunk + lane;
  const int64_t end = smaller((part + 1) * cut.chunk, cut.total);
  const int64_t count = begin < end ? divide(end - begin + cut.width - 1, cut.width) : 0;
  Row r(rest * cut.count + threadIdx.x / cut.width, m.positions, at_once);
  A* out = static_cast<A*>(m.out) + part * rows;
#pragma unroll 1
  for (int i = 0; i < cut.count; i += at_once, r.next()) {
    A sum[V] = {};
    if (r.row < rows) {
      const T* x = static_cast<const T*>(m.x) + r.sample * m.walk.stride_n +
                   offset_of(m.walk.space, r.q) + begin * V;
      accumulate<V>(sum, x, static_cast<int64_t>(cut.width) * V, count, p);
    }
#pragma unroll
    for (int half = V / 2; half > 0; half /= 2) {
#pragma unroll
      for (int j = 0; j < half; ++j) sum[j] += sum[j + half];
    }
    const A all = lanes_sum(sum[0], cut.width);
    if (lane == 0 && r.row < rows) out[r.row] = all;
  }
}

// Packs in a call that computes in double are of double alone: the rest is rare.
template <typename T, typename A>
constexpr int kPack = sizeof(A) == 8 && sizeof(T) < 8 ? 1 : 16 / int(sizeof(T));

template <typename A, typename P, int K>
__global__ void __launch_bounds__(kThreads, sizeof(A) == 4 ? 4 : 2)
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

// --- distances -----------------------------------------------------------------------------------

// Adaptive average pooling: cell i of `out` covers [begin, end) of `in`.
__device__ __forceinline__ int64_t cell_begin(int64_t i, int64_t in, int64_t out) {
  return divide(i * in, out);
}
__device__ __forceinline__ int64_t cell_end(int64_t i, int64_t in, int64_t out) {
  return divide((i + 1) * in + out - 1, out);
}

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
  for (int64_t a = begin[0]; a < end[0]; ++a)
#pragma unroll 1
    for (int64_t b = begin[1]; b < end[1]; ++b)
#pragma unroll 1
      for (int64_t c = begin[2]; c < end[2]; ++c) {
        const A* r = raw + (a * side.size[1] + b) * side.size[2] + c;
        A value = 0;
#pragma unroll 1
        for (int64_t part = 0; part < side.splits; ++part) value += r[part * samples * positions];
        sum += value;
      }
  return sum / static_cast<A>(end[0] - begin[0]) / static_cast<A>(end[1] - begin[1]) /
         static_cast<A>(end[2] - begin[2]);
}

// Products of a map and its scale are rounded on their own: fused into the difference of two such
// products, equal maps would differ.
__device__ __forceinline__ double scaled(double m, double scale) { return __dmul_rn(m, scale); }

__device__ __forceinline__ double unit_scale(double squares) {
  const double norm = sqrt(squares);
  return 1 / (norm > kEps ? norm : norm <= kEps ? kEps : norm);
}

// P of one position; an all-zero map is uniform over the positions kept.
__device__ __forceinline__ double share(double m, double total, double uniform, bool keep) {
  return !keep ? 0 : total == 0 ? uniform : m / total;
}

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

// The map's value at a cell, final: written back where it was not yet.
template <typename A>
__device__ __forceinline__ double final_value(const DistanceItem& d, int side, int64_t n,
                                              int64_t samples, int64_t q, bool keep) {
  A* map = static_cast<A*>(d.side[side].map) + n * d.cells + q;
  if (d.side[side].raw == nullptr && keep) return *map;
  const A value = keep ? settle<A>(d.side[side], d.space, n, samples, q) : A(0);
  *map = value;
  return value;
}

// D[n] of one sample, by one team; every thread of the block calls, idle ones with n ≥ samples.
template <typename A>
__device__ __forceinline__ double sample_distance(const DistanceItem& d, int64_t n,
                                                  int64_t samples, bool js, double beta,
                                                  double* shared) {
  const int lane = threadIdx.x % d.team;
  const int64_t cells = n < samples ? d.cells : 0;
  double sums[3] = {0, 0, 0};  // of the student's map, of the teacher's, positions kept
#pragma unroll 1
  for (int64_t q = lane; q < cells; q += d.team) {
    const bool keep = kept(d.mask, n, q, d.space);
    const double s = final_value<A>(d, 0, n, samples, q, keep);
    const double t = final_value<A>(d, 1, n, samples, q, keep);
    sums[0] += js ? s : s * s;
    sums[1] += js ? t : t * t;
    sums[2] += keep;
  }
  team_sum(sums, d.team, shared);
  const double uniform = sums[2] > 0 ? 1 / sums[2] : 0;
  const double scale_s = unit_scale(sums[0]), scale_t = unit_scale(sums[1]);
  // A thread reads again only what it wrote or what was final before.
  const A* map_s = static_cast<const A*>(d.side[0].map) + n * d.cells;
  const A* map_t = static_cast<const A*>(d.side[1].map) + n * d.cells;
  double distance[1] = {0};
#pragma unroll 1
  for (int64_t q = lane; q < cells; q += d.team) {
    const double s = map_s[q], t = map_t[q];
    if (js) {
      const bool keep = kept(d.mask, n, q, d.space);
      distance[0] +=
          js_term(share(s, sums[0], uniform, keep), share(t, sums[1], uniform, keep), beta);
    } else {
      const double difference = scaled(s, scale_s) - scaled(t, scale_t);
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
#pragma unroll 1
  for (int64_t n = threadIdx.x; n < samples; n += blockDim.x) sum[0] += __ldcg(d.each + n);
  team_sum(sum, blockDim.x, shared);
  if (threadIdx.x == 0) *static_cast<A*>(d.out) = static_cast<A>(sum[0] / samples);
}

constexpr int kDistanceThreads = 512;  // at most

template <typename A, int K>
__global__ void __launch_bounds__(kDistanceThreads)
    distance_kernel(const __grid_constant__ Table<DistanceItem, K> table, int64_t samples, int js,
                    double beta) {
  const DistanceItem& item = table.item[find(table, blockIdx.x)];
  double* shared = shared_memory<double>();
  const int teams = blockDim.x / item.team;
  const int64_t n = (blockIdx.x - item.first) * teams + threadIdx.x / item.team;
  const double distance = sample_distance<A>(item, n, samples, js != 0, beta, shared);
  if (threadIdx.x % item.team == 0 && n < samples) {
    if (item.each != nullptr)
      item.each[n] = distance;
    else
      static_cast<A*>(item.out)[n] = static_cast<A>(distance);
  }
  if (item.each != nullptr) finish_mean<A>(item, samples, shared);
}

// --- backward ------------------------------------------------------------------------------------

// What the slope of one map needs to know of its sample.
struct Sample {
  double scale, other_scale;  // l2
  double total, other_total;  // js
  double uniform, radial;
};

// dD/dm at a cell before the part along m itself is taken off; `own` is q or P there.
template <typename A>
__device__ __forceinline__ double bare_slope(const SlopeItem& c, const Sample& s, int64_t n,
                                             int64_t q, bool js, bool keep, double& own) {
  const double m = static_cast<const A*>(c.own)[n * c.cells + q];
  const double other = static_cast<const A*>(c.other)[n * c.cells + q];
  if (!js) {
    own = scaled(m, s.scale);
    return 2 * (own - scaled(other, s.other_scale));
  }
  own = share(m, s.total, s.uniform, keep);
  if (own == 0) return 0;
  // log(P/M) = −log1p((1−w)·(P_other − P)/P), exact where the two are nearly equal.
  const double p_other = share(other, s.other_total, s.uniform, keep);
  return -c.weight * log1p((1 - c.weight) * (p_other - own) / own);
}

// dD/dm at a cell.
template <typename A>
__device__ __forceinline__ double cell_slope(const SlopeItem& c, const Sample& s, int64_t n,
                                             int64_t q, bool js) {
  const bool keep = kept(c.mask, n, q, c.space);
  if (!keep || (js && s.total == 0)) return 0;
  double own;
  const double bare = bare_slope<A>(c, s, n, q, js, keep, own);
  return js ? (bare - s.radial) / s.total : (bare - own * s.radial) * s.scale;
}

// The transpose of pooling: every cell that holds the raw position gives its part.
template <typename A>
__device__ __forceinline__ double raw_slope(const SlopeItem& c, const Sample& s, int64_t n,
                                            int64_t r, bool js) {
  const Index3 at = unravel(r, c.size);
  int64_t low[3], high[3];
#pragma unroll
  for (int d = 0; d < 3; ++d) {
    low[d] = cell_begin(at.i[d], c.space[d], c.size[d]);
    high[d] = cell_end(at.i[d], c.space[d], c.size[d]);
  }
  double sum = 0;
#pragma unroll 1
  for (int64_t i = low[0]; i < high[0]; ++i)
#pragma unroll 1
    for (int64_t j = low[1]; j < high[1]; ++j)
#pragma unroll 1
      for (int64_t k = low[2]; k < high[2]; ++k) {
        const int64_t cell[3] = {i, j, k};
        double part = cell_slope<A>(c, s, n, (i * c.space[1] + j) * c.space[2] + k, js);
#pragma unroll
        for (int d = 0; d < 3; ++d)
          part /= static_cast<double>(cell_end(cell[d], c.size[d], c.space[d]) -
                                      cell_begin(cell[d], c.size[d], c.space[d]));
        sum += part;
      }
  return sum;
}

template <typename A>
__device__ __forceinline__ Sample read_sample(const SlopeItem& c, int64_t n, int64_t cells,
                                              bool js, double* shared) {
  const int lane = threadIdx.x % c.team;
  double sums[3] = {0, 0, 0};
#pragma unroll 1
  for (int64_t q = lane; q < cells; q += c.team) {
    const double m = static_cast<const A*>(c.own)[n * c.cells + q];
    const double other = static_cast<const A*>(c.other)[n * c.cells + q];
    sums[0] += js ? m : m * m;
    sums[1] += js ? other : other * other;
    sums[2] += kept(c.mask, n, q, c.space);
  }
  team_sum(sums, c.team, shared);
  Sample s;
  s.scale = unit_scale(sums[0]);
  s.other_scale = unit_scale(sums[1]);
  s.total = sums[0];
  s.other_total = sums[1];
  s.uniform = sums[2] > 0 ? 1 / sums[2] : 0;
  double radial[1] = {0};
#pragma unroll 1
  for (int64_t q = lane; q < cells; q += c.team) {
    double own;
    const double bare = bare_slope<A>(c, s, n, q, js, kept(c.mask, n, q, c.space), own);
    radial[0] += own * bare;
  }
  team_sum(radial, c.team, shared);
  s.radial = !js && sqrt(sums[0]) <= kEps ? 0 : radial[0];  // below eps the norm is a constant
  return s;
}

// `factor`: p, over N where the gradient is that of the mean.
template <typename A, int K>
__global__ void __launch_bounds__(kDistanceThreads)
    slope_kernel(const __grid_constant__ Table<SlopeItem, K> table, int64_t samples, int js,
                 double factor) {
  const SlopeItem& item = table.item[find(table, blockIdx.x)];
  const int teams = blockDim.x / item.team, lane = threadIdx.x % item.team;
  const int64_t n = (blockIdx.x - item.first) * teams + threadIdx.x / item.team;
  const bool active = n < samples;
  const Sample s =
      read_sample<A>(item, n, active ? item.cells : 0, js != 0, shared_memory<double>());
  if (!active) return;
  const double grad = factor * static_cast<const A*>(item.grad)[n * item.grad_stride];
  A* out = static_cast<A*>(item.out) + n * item.positions;
  const bool pooled = item.positions != item.cells;
#pragma unroll 1
  for (int64_t r = lane; r < item.positions; r += item.team)
    out[r] = static_cast<A>(grad * (pooled ? raw_slope<A>(item, s, n, r, js != 0)
                                           : cell_slope<A>(item, s, n, r, js != 0)));
}

template <int U, int V, typename T, typename A, typename P>
__device__ __forceinline__ void spread_packs(const A (&c)[V], const T* x, int64_t stride, T* dx,
                                             int64_t dx_stride, P p) {
  Pack<T, V> pack[U];
#pragma unroll
  for (int u = 0; u < U; ++u) pack[u] = load_pack<T, V>(x + u * stride);
#pragma unroll
  for (int u = 0; u < U; ++u) {
    A value[V];
    unpack<T, V>(pack[u], value);
#pragma unroll
    for (int j = 0; j < V; ++j) value[j] = slope(c[j], value[j], p);
    store_pack<T, V>(dx + u * dx_stride, pack_up<T, V>(value));
  }
}

template <int V, typename T, typename A, typename P>
__device__ __forceinline__ void spread(const A (&c)[V], const T* x, int64_t stride, T* dx,
                                       int64_t dx_stride, int64_t count, P p) {
  constexpr int U = P::kStores;
#pragma unroll 1
  for (; count >= U; count -= U, x += U * stride, dx += U * dx_stride)
    spread_packs<U, V>(c, x, stride, dx, dx_stride, p);
  if constexpr (U > 1) {
#pragma unroll 1
    for (; count > 0; --count, x += stride, dx += dx_stride)
      spread_packs<1, V>(c, x, stride, dx, dx_stride, p);
  }
}

template <typename T, int V, typename A, typename P>
__device__ __forceinline__ void plane_spread(const SpreadItem& m, int64_t block, P p) {
  const Spot s = find_spot(m.cut, m.n, block);
  if (s.count == 0) return;
  const A* slopes = static_cast<const A*>(m.slope) + s.sample * m.positions;
  A c[V];
  int64_t q = s.column * V;
  q -= divide(q, m.positions) * m.positions;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    c[j] = slopes[q];
    q = q + 1 == m.positions ? 0 : q + 1;
  }
  const T* x = static_cast<const T*>(m.x) + s.sample * m.from.stride_n +
               offset_of(m.from.space, s.column * V) + s.begin * m.from.step;
  T* dx = static_cast<T*>(m.dx) + s.sample * m.to.stride_n +
          offset_of(m.to.space, s.column * V) + s.begin * m.to.step;
  spread<V>(c, x, m.cut.groups * m.from.step, dx, m.cut.groups * m.to.step, s.count, p);
}

template <typename T, int V, typename A, typename P>
__device__ __forceinline__ void row_spread(const SpreadItem& m, int64_t block, P p) {
  const Cut& cut = m.cut;
  const int64_t rest = divide(block, cut.splits), part = block - rest * cut.splits;
  const int64_t rows = m.n * m.positions;
  const int lane = threadIdx.x % cut.width, at_once = kThreads / cut.width;
  const int64_t begin = part * cut.chunk + lane;
  const int64_t end = smaller((part + 1) * cut.chunk, cut.total);
  const int64_t count = begin < end ? divide(end - begin + cut.width - 1, cut.width) : 0;
  const int64_t stride = static_cast<int64_t>(cut.width) * V;
  Row r(rest * cut.count + threadIdx.x / cut.width, m.positions, at_once);
#pragma unroll 1
  for (int i = 0; i < cut.count && r.row < rows; i += at_once, r.next()) {
    A c[V];
    const A slope_here = static_cast<const A*>(m.slope)[r.row];
#pragma unroll
    for (int j = 0; j < V; ++j) c[j] = slope_here;
    const T* x = static_cast<const T*>(m.x) + r.sample * m.from.stride_n +
                 offset_of(m.from.space, r.q) + begin * V;
    T* dx = static_cast<T*>(m.dx) + r.sample * m.to.stride_n + offset_of(m.to.space, r.q) +
            begin * V;
    spread<V>(c, x, stride, dx, stride, count, p);
  }
}

// Dropped tokens never reached the map: `positions` of them, `cut.total` channels.
template <typename T>
__device__ __forceinline__ void clear(const SpreadItem& m, int64_t block) {
  const int64_t channels = m.cut.total, all = m.n * m.positions * channels;
  const int64_t end = smaller((block + 1) * m.cut.count, all);
#pragma unroll 1
  for (int64_t e = block * m.cut.count + threadIdx.x; e < end; e += kThreads) {
    const int64_t row = divide(e, channels), sample = divide(row, m.positions);
    static_cast<T*>(m.dx)[sample * m.to.stride_n + (e - row * channels) * m.to.step +
                          offset_of(m.to.space, row - sample * m.positions)] = T{};
  }
}

template <typename A, typename P, int K>
__global__ void __launch_bounds__(kThreads, sizeof(A) == 4 ? 4 : 2)
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
