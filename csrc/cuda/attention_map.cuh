// Σ_c |x|^p of one operand, read in place whatever its strides, and the way back through it.
#pragma once

#include "common.cuh"

namespace lwkd::cuda {

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

__device__ __forceinline__ int64_t offset_of(const Space& s, int64_t q) {
  if (q < s.length) return q * s.stride[2];
  const int64_t run = divide(q, s.length), outer = divide(run, s.middle);
  return outer * s.stride[0] + (run - outer * s.middle) * s.stride[1] +
         (q - run * s.length) * s.stride[2];
}

// --- powers: the ones people use cost a multiplication -------------------------------------------

struct One {
  static constexpr bool kCommon = true;
  static constexpr int kLoads = 8, kStores = 4;  // packs in flight
};
struct Two : One {};
struct Any {
  static constexpr bool kCommon = false;
  static constexpr int kLoads = 2, kStores = 1;
  double p;
};

// pow is a long routine, kept out of line. Doubles come here with every p.
template <typename A>
__device__ __noinline__ A positive_power(A x, A p) {
  if constexpr (std::is_same_v<A, double>) {
    if (p == 2) return x * x;
    if (p == 1) return x;
  }
  return pow(x, p);
}

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
  return positive_power(static_cast<A>(fabs(x)), static_cast<A>(any.p));
}

// A NaN or an Inf that counts has made every c of its sample NaN. Beside one, c is a number only
// where a mask leaves the position out; then c is 0, and any finite x will do.
template <typename A>
__device__ __forceinline__ A finite(A x) {
  return x - x == 0 ? x : A(1);
}

// c · d|x|^p/dx, where c already holds the factor p; exactly 0 at x = 0 whatever c is.
template <typename A>
__device__ __forceinline__ A slope(A c, A x, One) {
  return x > 0 ? c : x < 0 ? -c : x != x ? c : A(0);
}
template <typename A>
__device__ __forceinline__ A slope(A c, A x, Two) {
  return x == 0 ? A(0) : c * finite(x);
}
template <typename A>
__device__ __forceinline__ A slope(A c, A x, Any any) {
  if (any.p == 1) return slope(c, x, One{});
  const A magnitude = positive_power(static_cast<A>(fabs(finite(x))), static_cast<A>(any.p - 1));
  return x == 0 ? A(0) : c * copysign(magnitude, x);
}

// Packs in a call that computes in double are of double alone: the rest is rare.
template <typename T, typename A>
constexpr int kPack = sizeof(A) == 8 && sizeof(T) < 8 ? 1 : 16 / int(sizeof(T));

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

// Where a column of packs begins in its sample; packs only where positions follow each other.
template <int V>
__device__ __forceinline__ int64_t column_offset(const Space& s, int64_t column) {
  if constexpr (V > 1)
    return column * V;
  else
    return offset_of(s, column);
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
                 column_offset<V>(m.walk.space, s.column) + s.begin * m.walk.step;
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

// --- the way back: dx = slope · d|x|^p/dx --------------------------------------------------------

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
               column_offset<V>(m.from.space, s.column) + s.begin * m.from.step;
  T* dx = static_cast<T*>(m.dx) + s.sample * m.to.stride_n +
          column_offset<V>(m.to.space, s.column) + s.begin * m.to.step;
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
    T* dx =
        static_cast<T*>(m.dx) + r.sample * m.to.stride_n + offset_of(m.to.space, r.q) + begin * V;
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

}  // namespace lwkd::cuda
