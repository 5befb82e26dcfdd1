// CPU kernels of the Hessian kind; lwkd/ops/hessian.py states the formulas. Signs are made where
// they are needed, 128 at a time, and never stored.
#include <algorithm>
#include <vector>

#include "logical.h"
#include "operand.h"
#include "philox.h"

namespace lwkd {
namespace {

constexpr int64_t kWords = kTile / 32;  // of a tile's signs

// The words of elements [begin, end) of a tile; begin is a multiple of 128.
inline void words_of(const Probe& probe, int64_t begin, int64_t end, uint32_t* words) {
  for (int64_t block = begin / 128; block * 128 < end; ++block) {
    const PhiloxWords w = probe.block(block);
    std::copy_n(w.w, 4, words + (block * 128 - begin) / 32);
  }
}

// The bits of elements begin, begin + 1, … from the first bit on; count is at most a run's.
inline void words_at(const Probe& probe, int64_t begin, int64_t count, uint32_t* words) {
  uint32_t raw[kRun / 32 + 9] = {};
  words_of(probe, begin / 128 * 128, begin + count, raw);
  const int64_t skip = begin % 128 / 32, bits = begin % 32;
  for (int64_t i = 0; i * 32 < count; ++i) {
    const uint64_t two = raw[skip + i] | uint64_t{raw[skip + i + 1]} << 32;
    words[i] = static_cast<uint32_t>(two >> bits);
  }
}

// ±x by bits kFirst … kFirst + 7 of a word: a clear one flips the sign.
template <int kFirst>
LWKD_INLINE Float8 signed_by(Float8 x, uint32_t word) {
  const Int8 shift = {31, 30, 29, 28, 27, 26, 25, 24};
  const Int8 clear = (Int8{} + ~word) << (shift - kFirst);
  return (Float8)((Int8)x ^ (clear & 0x80000000u));
}
LWKD_INLINE float signed_by(float x, uint32_t word, int bit) { return word >> bit & 1 ? x : -x; }
LWKD_INLINE double signed_by(double x, uint32_t word, int bit) { return word >> bit & 1 ? x : -x; }

// Σ ±x[q] in float64: 16 partial sums, added in one fixed order.
template <typename Wide>
LWKD_INLINE double sum_signed(const float* x, const uint32_t* words, int64_t count) {
  constexpr int kWide = kLanes<Wide>;
  Wide sum[16 / kWide] = {};
  int64_t q = 0;
  const auto add = [&]<int kPart>(uint32_t word) LWKD_LAMBDA {
    const Float8 y = signed_by<8 * kPart>(load(x + q + 8 * kPart), word);
    Floats<kWide> parts[8 / kWide];
    std::memcpy(parts, &y, sizeof(y));
    for (int k = 0; k < 8 / kWide; ++k) sum[8 / kWide * (kPart % 2) + k] += doubles(parts[k]);
  };
  for (; q + 32 <= count; q += 32) {
    read_ahead<32>(x + q);
    const uint32_t word = words[q / 32];
    add.template operator()<0>(word);
    add.template operator()<1>(word);
    add.template operator()<2>(word);
    add.template operator()<3>(word);
  }
  for (int lane = 0; q < count; ++q, lane = (lane + 1) % 16)
    sum[lane / kWide][lane % kWide] += double(signed_by(x[q], words[q / 32], q % 32));
  return total(sum);
}
template <typename Wide>
LWKD_INLINE double sum_signed(const double* x, const uint32_t* words, int64_t count) {
  double sum[16] = {};
  for (int64_t q = 0; q < count; ++q) sum[q % 8] += signed_by(x[q], words[q / 32], q % 32);
  Double4 both[4];
  std::memcpy(both, sum, sizeof(both));
  return total(both);
}

LWKD_INLINE void write_signs(const uint32_t* words, int64_t count, float* to) {
  const Float8 one = Float8{} + 1;
  int64_t q = 0;
  for (; q + 32 <= count; q += 32) {
    const uint32_t word = words[q / 32];
    store(signed_by<0>(one, word), to + q);
    store(signed_by<8>(one, word), to + q + 8);
    store(signed_by<16>(one, word), to + q + 16);
    store(signed_by<24>(one, word), to + q + 24);
  }
  for (; q < count; ++q) to[q] = signed_by(1.0f, words[q / 32], q % 32);
}
LWKD_INLINE void write_signs(const uint32_t* words, int64_t count, double* to) {
  for (int64_t q = 0; q < count; ++q) to[q] = signed_by(1.0, words[q / 32], q % 32);
}

// One ordinary function per type: clones need that.
#define LWKD_SIGNED(A)                                                                     \
  LWKD_WIDE_CLONES(double, signed_sum, (const A* x, const uint32_t* words, int64_t count), \
                   (x, words, count), return sum_signed<Wide>(x, words, count);)           \
  LWKD_CLONES void signs(const uint32_t* words, int64_t count, A* to) {                    \
    write_signs(words, count, to);                                                         \
  }
LWKD_SIGNED(float)
LWKD_SIGNED(double)

// --- the ops -------------------------------------------------------------------------------------

void check_tensor(const Tensor& x, const char* op, const char* argument, int64_t layer) {
  const ScalarType dtype = x.scalar_type();
  const bool floating = dtype == ScalarType::Double || dtype == ScalarType::Float ||
                        dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
  STD_TORCH_CHECK(floating, "lwkd.ops: ", op, ": ", argument, " (layer ", layer,
                  "): expected float64, float32, float16 or bfloat16, got another dtype");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(x.const_data_ptr()) % element_size(dtype) == 0,
                  "lwkd.ops: ", op, ": ", argument, " (layer ", layer,
                  "): expected data aligned to its elements, got a tensor that is not; pass a ",
                  "clone()");
}

Tensor rademacher(Tensor like, int64_t seed, int64_t layer, int64_t probe) {
  check_tensor(like, "rademacher", "like", layer);
  Tensor out = fresh_like(like);
  const Logical to(out, 0, 0);
  const Probe signs_of{static_cast<uint64_t>(seed), static_cast<uint32_t>(layer),
                       static_cast<uint32_t>(probe)};
  std::vector<Block> blocks{make_block(1, 1, to.length)};
  parallel_tasks(blocks, [&](int64_t, int64_t, int64_t begin, int64_t end) {
    uint32_t words[kWords];
    words_of(signs_of, begin, end, words);
    const auto write = [&](auto type) {
      using A = decltype(type);
      alignas(64) A buffer[kTile];
      A* in_place = to.direct<A>(begin);
      signs(words, end - begin, in_place != nullptr ? in_place : buffer);
      if (in_place != nullptr) return;
      with_storage<A>(to.dtype, [&](auto stored) {
        using T = decltype(stored);
        to.cover(begin, end, [&](char* at, Runs runs, int64_t first) {
          put(buffer + first, reinterpret_cast<T*>(at), runs);
        });
      });
    };
    to.dtype == ScalarType::Double ? write(double{}) : write(float{});
  });
  return out;
}

// Σ ±x over a tile.
template <typename A>
double tile_sum(const Logical& x, const Probe& probe, int64_t tile) {
  alignas(64) A buffer[kTile];
  uint32_t words[kWords];
  if (x.along >= 0) {
    double sum = 0;
    x.abreast(tile, buffer, [&](int64_t begin, int64_t count, const A* run) {
      words_at(probe, begin, count, words);
      sum += signed_sum(run, words, count);
    });
    return sum;
  }
  const int64_t begin = tile * kTile, end = std::min(begin + kTile, x.length);
  words_of(probe, begin, end, words);
  const A* from = x.direct<A>(begin);
  if (from == nullptr) {
    with_storage<A>(x.dtype, [&](auto stored) {
      using T = decltype(stored);
      x.cover(begin, end, [&](char* at, Runs runs, int64_t first) {
        bring(reinterpret_cast<const T*>(at), runs, buffer + first);
      });
    });
    from = buffer;
  }
  return signed_sum(from, words, end - begin);
}

Tensor probe_dot(std::vector<Tensor> hvps, std::vector<int64_t> layers, int64_t seed, int64_t probe,
                 int64_t probes) {
  const char* op = "probe_dot";
  const int64_t count = hvps.size(), each = std::max<int64_t>(probes, 1);
  STD_TORCH_CHECK(count > 0 && layers.size() == hvps.size(), "lwkd.ops: ", op,
                  ": hvps: expected at least one, with a layer each, got ", count);
  std::vector<std::vector<Logical>> items(count);
  std::vector<Block> blocks;
  std::vector<int64_t> first;
  int64_t tiles = 0;
  for (int64_t i = 0; i < count; ++i) {
    check_tensor(hvps[i], op, "hvps", i);
    STD_TORCH_CHECK(probes == 0 || (hvps[i].dim() > 0 && hvps[i].size(0) == probes),
                    "lwkd.ops: ", op, ": hvps (layer ", i, "): expected ", probes,
                    " probes, got others");
    for (int64_t k = 0; k < each; ++k) items[i].emplace_back(hvps[i], probes == 0 ? 0 : 1, k);
    blocks.push_back(make_block(each, 1, items[i][0].positions()));
    first.push_back(tiles);
    tiles += blocks.back().tasks();
  }
  std::vector<double> partial(tiles, 0);
  parallel_tasks(blocks, [&](int64_t i, int64_t k, int64_t begin, int64_t) {
    const Logical& x = items[i][k];
    const Probe signs_of{static_cast<uint64_t>(seed), static_cast<uint32_t>(layers[i]),
                         static_cast<uint32_t>(probe + k)};
    const int64_t tile = begin / kTile;
    partial[first[i] + k * blocks[i].tiles + tile] = x.dtype == ScalarType::Double
                                                         ? tile_sum<double>(x, signs_of, tile)
                                                         : tile_sum<float>(x, signs_of, tile);
  });
  const bool wide = any_double(hvps);
  Tensor out =
      make(hvps[0], probes == 0 ? std::vector<int64_t>{count} : std::vector<int64_t>{count, probes},
           wide);
  const auto conclude = [&](auto* to) {
    using A = std::remove_pointer_t<decltype(to)>;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t k = 0; k < each; ++k) {
        double sum = 0;
        for (int64_t t = 0; t < blocks[i].tiles; ++t)
          sum += partial[first[i] + k * blocks[i].tiles + t];
        to[i * each + k] = static_cast<A>(sum);
      }
  };
  void* data = out.mutable_data_ptr();
  wide ? conclude(static_cast<double*>(data)) : conclude(static_cast<float*>(data));
  return out;
}

}  // namespace
}  // namespace lwkd

STABLE_TORCH_LIBRARY_IMPL(lwkd, CPU, m) {
  m.impl("rademacher", LWKD_BOX(lwkd::rademacher));
  m.impl("probe_dot", LWKD_BOX(lwkd::probe_dot));
}
