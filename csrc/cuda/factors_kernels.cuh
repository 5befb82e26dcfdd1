// Kernels around the library's products of matrices, for Jacobian factors; lwkd/ops/factors.py
// states the formulas, factors_plan.cuh says what is multiplied.
//
//   gather_kernel       a block of an operand, student's, teacher's or stacked, without gaps
//   index_gram_kernel   products of rows that an embedding's indices stand for
//   accumulate_kernel   a product added to what the steps before it have left
//   dot_kernel          the epilogue: Σ x·y over two products, sample by sample, in float64
//   add_kernel          its pieces added up
//   ratio_kernel        c of a layer, and its share of every parameter's a and δ
//   factor_distance_kernel
//
// No sum's order depends on anything but shapes.
#pragma once

#include "jacobian_kernels.cuh"

namespace lwkd::cuda {

// What is summed of a parameter and sample.
enum Slot : int32_t { kOwnSquare, kOtherSquare, kStackSquare, kStackOwn, kOwnA, kOtherA, kSlots };

// A way of factors alone: ‖G_S‖², and nothing of a teacher.
constexpr int32_t kSquareNorms = 3;

// Rows of an operand: one network's, or those of the stack, twice as many:
//   of a   a_S, and then a_S − c_a·a_T         of δ   δ_S − c_d·δ_T, and then c_d·δ_T
enum Mixture : int32_t { kStudentRows, kTeacherRows, kStackA, kStackD };

// One tensor as matrices: sample n, group g, row r, column j.
struct Source {
  const void* data;
  int32_t dtype;
  int64_t n, g, channel;  // strides, in elements
  int64_t space[3];       // likewise
  int64_t size[3];        // beyond which there are zeros
};

// Row r is a position, column j a channel and a tap of the kernel. A matrix has one tap, and its
// rows along the last dimension.
struct Patches {
  int64_t positions[3], kernel[3], stride[3], dilation[3], padding[3];
  int64_t taps;
};

struct Gather {
  Source s, t;
  Patches patches;
  int32_t mixture;
  bool by_column;                 // rows lie side by side
  int64_t n, samples, g, groups;  // first and how many
  int64_t row, rows, column, columns;
  int64_t length;   // rows of one network
  const double* c;  // of sample n at n · 2
};

struct Indices {
  const int64_t* ids[2];  // student's and teacher's
  int64_t n[2], row[2];   // strides
};

struct IndexGram {
  Indices x;
  int32_t mixture[2];
  int64_t n, samples;
  int64_t row[2], rows[2];
  int64_t length;
};

// --- operands ------------------------------------------------------------------------------------

template <typename A>
__device__ __forceinline__ double number_at(const Source& s, const Patches& p, int64_t n, int64_t g,
                                            int64_t row, int64_t column) {
  int64_t at = n * s.n + g * s.g;
  if (p.taps == 1 && p.positions[0] * p.positions[1] == 1) {
    const int64_t i = row * p.stride[2] - p.padding[2];
    if (i < 0 || i >= s.size[2]) return 0;
    at += column * s.channel + i * s.space[2];
  } else {
    const int64_t channel = divide(column, p.taps);
    at += channel * s.channel;
    int64_t tap = column - channel * p.taps;
#pragma unroll
    for (int k = 2; k >= 0; --k) {
      const int64_t rest = divide(row, p.positions[k]), other = divide(tap, p.kernel[k]);
      const int64_t i = (row - rest * p.positions[k]) * p.stride[k] - p.padding[k] +
                        (tap - other * p.kernel[k]) * p.dilation[k];
      if (i < 0 || i >= s.size[k]) return 0;
      at += i * s.space[k];
      row = rest, tap = other;
    }
  }
  double x = 0;
  with_dtype<A>(s.dtype, [&](auto type) {
    x = widen(load(static_cast<const decltype(type)*>(s.data) + at));
  });
  return x;
}

template <typename A>
__device__ __forceinline__ A mixed_at(const Gather& x, int64_t n, int64_t g, int64_t row,
                                      int64_t column) {
  const int64_t r = row < x.length ? row : row - x.length;
  const bool second = row >= x.length;
  const auto student = [&] { return number_at<A>(x.s, x.patches, n, g, r, column); };
  const auto teacher = [&] { return number_at<A>(x.t, x.patches, n, g, r, column); };
  if (x.mixture == kStudentRows || (x.mixture == kStackA && !second))
    return static_cast<A>(student());
  if (x.mixture == kTeacherRows) return static_cast<A>(teacher());
  const double c = x.c[2 * n];
  if (x.mixture == kStackD && second) return static_cast<A>(c * teacher());
  return static_cast<A>(fma(-c, teacher(), student()));
}

// out [samples, groups, rows, columns], or with rows last.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const __grid_constant__ Gather x, int64_t total, A* out) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t q = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; q < total;
       q += step) {
    const int64_t inner = x.by_column ? x.rows : x.columns;
    const int64_t outer = x.by_column ? x.columns : x.rows;
    int64_t rest = divide(q, inner);
    const int64_t i = q - rest * inner;
    const int64_t next = divide(rest, outer), o = rest - next * outer;
    const int64_t n = divide(next, x.groups), g = next - n * x.groups;
    const int64_t row = x.row + (x.by_column ? i : o), column = x.column + (x.by_column ? o : i);
    out[q] = mixed_at<A>(x, x.n + n, x.g + g, row, column);
  }
}

// A row of an embedding's stack is e_s, or e_s − e_t.
struct IndexRow {
  int64_t plus, minus;  // −1: nothing
};

__device__ __forceinline__ IndexRow index_row(const IndexGram& x, int side, int64_t n,
                                              int64_t row) {
  const int64_t r = row < x.length ? row : row - x.length;
  const int64_t own = x.mixture[side] == kTeacherRows ? 1 : 0;
  IndexRow out{__ldg(x.x.ids[own] + n * x.x.n[own] + r * x.x.row[own]), -1};
  if (x.mixture[side] == kStackA && row >= x.length)
    out.minus = __ldg(x.x.ids[1] + n * x.x.n[1] + r * x.x.row[1]);
  return out;
}

// out [samples, rows, rows'].
template <typename A>
__global__ void __launch_bounds__(kThreads)
    index_gram_kernel(const __grid_constant__ IndexGram x, int64_t total, A* out) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t q = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; q < total;
       q += step) {
    const int64_t rest = divide(q, x.rows[1]), j = q - rest * x.rows[1];
    const int64_t n = divide(rest, x.rows[0]), i = rest - n * x.rows[0];
    const IndexRow a = index_row(x, 0, x.n + n, x.row[0] + i);
    const IndexRow b = index_row(x, 1, x.n + n, x.row[1] + j);
    // Nothing is no row, not even another's nothing.
    const int sum = (a.plus == b.plus) + (a.minus >= 0 && a.minus == b.minus) -
                    (a.plus == b.minus) - (a.minus == b.plus);
    out[q] = static_cast<A>(sum);
  }
}

// --- epilogue ------------------------------------------------------------------------------------

template <typename A>
__global__ void __launch_bounds__(kThreads) accumulate_kernel(A* to, const A* more, int64_t total) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t q = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; q < total; q += step)
    to[q] += more[q];
}

// A block a piece of a sample's numbers: out [samples, pieces].
template <typename A>
__global__ void __launch_bounds__(kThreads)
    dot_kernel(const A* x, const A* y, int64_t length, int32_t pieces, double* out) {
  const int64_t n = blockIdx.x / pieces, piece = blockIdx.x % pieces;
  const int64_t size = divide(length + pieces - 1, pieces);
  const int64_t begin = piece * size, end = smaller(begin + size, length);
  x += n * length, y += n * length;
  double sum[1] = {0};
#pragma unroll 4
  for (int64_t q = begin + threadIdx.x; q < end; q += kThreads)
    sum[0] = fma(static_cast<double>(x[q]), static_cast<double>(y[q]), sum[0]);
  team_sum(sum, kThreads, shared_memory<double>());
  if (threadIdx.x == 0) out[blockIdx.x] = sum[0];
}

// to[n · kSlots] += weight · Σ partial[n, pieces].
__global__ void __launch_bounds__(kThreads)
    add_kernel(const double* partial, int64_t samples, int32_t pieces, double weight, double* to) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= samples) return;
  double sum = 0;
#pragma unroll 4
  for (int32_t k = 0; k < pieces; ++k) sum += partial[n * pieces + k];
  to[n * kSlots] = fma(weight, sum, to[n * kSlots]);
}

// --- a layer -------------------------------------------------------------------------------------

__device__ __forceinline__ double ratio(double ss, double tt) {
  return ss > 0 && tt > 0 ? sqrt(ss / tt) : 1;
}

// Of a gram what is nothing may round below it; NaN stays.
__device__ __forceinline__ double no_less_than_0(double x) { return x < 0 ? 0 : x; }

// One sum of all parameters of a layer; sums [items, N, kSlots].
__device__ __forceinline__ double whole(const double* sums, int64_t items, int64_t samples,
                                        int64_t n, int32_t slot) {
  double sum = 0;
  for (int64_t i = 0; i < items; ++i) sum += sums[(i * samples + n) * kSlots + slot];
  return sum;
}

__device__ __forceinline__ double layer_ratio(const double* sums, int64_t items, int64_t samples,
                                              int64_t n, int32_t way) {
  if (way != kNormalized) return 1;
  return ratio(whole(sums, items, samples, n, kOwnSquare),
               whole(sums, items, samples, n, kOtherSquare));
}

// c = c_a·c_d, for every parameter and sample: coefficients [items, N, 2].
__global__ void __launch_bounds__(kThreads)
    ratio_kernel(const double* sums, int64_t items, int64_t samples, int32_t way,
                 double* coefficients) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= samples) return;
  const double c = layer_ratio(sums, items, samples, n, way);
  for (int64_t i = 0; i < items; ++i) {
    const double* own = sums + (i * samples + n) * kSlots;
    const double c_a = ratio(own[kOwnA], own[kOtherA]);
    coefficients[(i * samples + n) * 2] = c_a;
    coefficients[(i * samples + n) * 2 + 1] = c / c_a;
  }
}

// out [N].
template <typename A>
__global__ void __launch_bounds__(kThreads)
    factor_distance_kernel(const double* sums, int64_t items, int64_t samples, int32_t way,
                           A* out) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= samples) return;
  const auto sum = [&](int32_t slot) { return whole(sums, items, samples, n, slot); };
  double d;
  if (way == kDifference) {
    d = sum(kStackSquare);
  } else if (way == kSquareNorms) {
    d = no_less_than_0(sum(kOwnSquare));
  } else if (way == kNorms) {
    const double ns = sqrt(no_less_than_0(sum(kOwnSquare)));
    const double nt = sqrt(no_less_than_0(sum(kOtherSquare)));
    const double ratio = ns + nt == 0 ? 0 : (ns - nt) / (ns + nt);
    d = ratio * ratio;
  } else {
    const double c = layer_ratio(sums, items, samples, n, way);
    const double uu = sum(kStackSquare), us = sum(kStackOwn);
    const double ss = no_less_than_0(sum(kOwnSquare));
    const double vv = no_less_than_0(ss - 2 * us + uu);  // v = c·G_T
    const double ns = sqrt(ss), nv = sqrt(vv), nt = nv / c;
    if (ns < kEps || nt < kEps) {
      const double a = ns < kEps ? kEps : ns, b = nt < kEps ? kEps : nt, most = ns * nt;
      double st = (ss - us) / c;
      st = st > most ? most : st < -most ? -most : st;
      d = ss / (a * a) + vv / (c * c) / (b * b) - 2 * (st / (a * b));
    } else {
      const double x = (2 * us - uu) / (ns + nv);
      d = (uu - x * x) / (ns * nv);
    }
    d = no_less_than_0(d);
  }
  out[n] = static_cast<A>(d);
}

}  // namespace lwkd::cuda
