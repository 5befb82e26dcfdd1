// Rows of one or more tensors, read in place whatever their strides, and shared out to threads.
#pragma once

#include "common.cuh"

namespace lwkd::cuda {

constexpr int kDims = 4;  // of a row, merged where nothing lies between; the plan has the rest

// Tensors of one shape [N, ...] walked together, and how their rows fall into blocks.
struct Rows {
  int64_t n, length;     // rows; elements of a row
  int64_t piece;         // elements of a piece
  int32_t pieces, team;  // pieces of a row; threads of a piece: a warp or the block
  int64_t size[kDims];   // innermost first; no index reaches the end of the outermost
  void* data[3];
  int64_t stride_n[3], stride[3][kDims];
  int32_t dtype[3];
  bool dense;  // elements of every row lie one behind the other
  bool packs;  // and may be read 16 bytes at a time, where they are aligned
};

// --- what a thread reads -------------------------------------------------------------------------

// The piece that a team has of a row.
struct Share {
  int64_t n, begin, count;
  int lane, team, piece;
};

__device__ __forceinline__ Share share_of(const Rows& r, int64_t block) {
  Share s{};
  s.team = r.team;
  s.lane = threadIdx.x % r.team;
  const int64_t group = divide(block, r.pieces);
  s.piece = static_cast<int>(block - group * r.pieces);
  s.n = group * (kThreads / r.team) + threadIdx.x / r.team;
  s.begin = s.piece * r.piece;
  s.count = s.n < r.n ? smaller(r.piece, r.length - s.begin) : 0;
  return s;
}

// Where the piece begins in tensor k, whose elements lie one behind the other.
template <typename T>
__device__ __forceinline__ T* begin_of(const Rows& r, int k, const Share& s) {
  return static_cast<T*>(r.data[k]) + s.n * r.stride_n[k] + s.begin;
}

// Where element q of a row lies in each tensor.
struct Places {
  int64_t at[3];
};

__device__ __forceinline__ Places places(const Rows& r, int64_t n, int64_t q) {
  Places p{{n * r.stride_n[0], n * r.stride_n[1], n * r.stride_n[2]}};
#pragma unroll 1
  for (int d = 0;; ++d) {
    const bool last = q < r.size[d];
    const int64_t left = last ? 0 : divide(q, r.size[d]), index = q - left * r.size[d];
#pragma unroll
    for (int k = 0; k < 3; ++k) p.at[k] += index * r.stride[k][d];
    if (last) return p;
    q = left;
  }
}

__device__ __forceinline__ double read(const Rows& r, int k, const Places& p) {
  double x = 0;
  with_dtype<double>(r.dtype[k], [&](auto tag) {
    using T = decltype(tag);
    x = widen(load(static_cast<const T*>(r.data[k]) + p.at[k]));
  });
  return x;
}

// V elements, 16 bytes at a time.
template <typename T, int V>
struct Chunk {
  static constexpr int kEach = 16 / int(sizeof(T)), kWords = V / kEach;
  Words words[kWords];

  __device__ __forceinline__ void read(const T* p) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = load_pack<T, kEach>(p + i * kEach);
  }
  __device__ __forceinline__ void write(T* p) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) store_pack<T, kEach>(p + i * kEach, words[i]);
  }
  __device__ __forceinline__ void get(double (&out)[V]) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      double part[kEach];
      unpack<T, kEach>(words[i], part);
#pragma unroll
      for (int j = 0; j < kEach; ++j) out[i * kEach + j] = part[j];
    }
  }
  __device__ __forceinline__ void set(const double (&in)[V]) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      double part[kEach];
#pragma unroll
      for (int j = 0; j < kEach; ++j) part[j] = in[i * kEach + j];
      words[i] = pack_up<T, kEach>(part);
    }
  }
};

// Elements of two rows that are read together: whole words of both.
template <typename S, typename T>
constexpr int kTogether = 16 / int(sizeof(S) < sizeof(T) ? sizeof(S) : sizeof(T));

// Steps in flight, of `words` words each.
template <int WORDS>
constexpr int kInFlight = WORDS > 4 ? 1 : 8 / WORDS;

__device__ __forceinline__ bool on_word(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// Elements before the first that begins a word of both; all of them where there is none.
template <typename S, typename T>
__device__ __forceinline__ int64_t head_of(const S* s, const T* t, int64_t count) {
  const auto narrower = reinterpret_cast<uintptr_t>(
      sizeof(S) <= sizeof(T) ? static_cast<const void*>(s) : static_cast<const void*>(t));
  constexpr int64_t kElement = sizeof(S) <= sizeof(T) ? sizeof(S) : sizeof(T);
  const int64_t head = static_cast<int64_t>((16 - narrower % 16) % 16) / kElement;
  return head < count && on_word(s + head) && on_word(t + head) ? head : count;
}

// Shares out `count` elements: calls steps(q, step, end) for U steps of V elements from q on, those
// that begin before `end`, and one(q) for what lies before the first and behind the last.
template <int V, int U, typename Steps, typename One>
__device__ __forceinline__ void walk(const Share& share, int64_t head, const Steps& steps,
                                     const One& one) {
  const int64_t whole = (share.count - head) / V * V, end = head + whole;
  const int64_t step = int64_t{share.team} * V;
#pragma unroll 1
  for (int64_t q = head + share.lane * V; q < end; q += U * step) steps(q, step, end);
  const int64_t rest = share.count - whole;
#pragma unroll 4
  for (int64_t i = share.lane; i < rest; i += share.team) one(i < head ? i : i + whole);
}

// Calls run(S{}, T{}) for the storage types of two rows; false where they are walked one element
// at a time: float64 beside anything else is rare.
template <bool PAIR, typename Run>
__device__ __forceinline__ bool with_types(int32_t s, int32_t t, const Run& run) {
  if constexpr (!PAIR) {
    with_dtype<double>(s, [&](auto tag) { run(tag, tag); });
  } else if (s == kDouble && t == kDouble) {
    run(double{}, double{});
  } else if (s == kDouble || t == kDouble) {
    return false;
  } else {
    with_dtype<float>(
        s, [&](auto own) { with_dtype<float>(t, [&](auto other) { run(own, other); }); });
  }
  return true;
}

}  // namespace lwkd::cuda
