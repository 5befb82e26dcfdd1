// Philox4x32-10 (Salmon, Moraes, Dror & Shaw 2011), on CPU and GPU; lwkd/ops/philox.py says which
// counter is whose. No torch here.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define LWKD_ANYWHERE __host__ __device__ __forceinline__
#else
#define LWKD_ANYWHERE inline __attribute__((always_inline))
#endif

namespace lwkd {

struct PhiloxWords {
  uint32_t w[4];
};

LWKD_ANYWHERE PhiloxWords philox(uint64_t key, PhiloxWords counter) {
  uint32_t low = static_cast<uint32_t>(key), high = static_cast<uint32_t>(key >> 32);
  uint32_t a = counter.w[0], b = counter.w[1], c = counter.w[2], d = counter.w[3];
  for (int round = 0; round < 10; ++round) {
    const uint64_t p = uint64_t(0xD2511F53u) * a, q = uint64_t(0xCD9E8D57u) * c;
    const uint32_t next_a = static_cast<uint32_t>(q >> 32) ^ b ^ low;
    const uint32_t next_c = static_cast<uint32_t>(p >> 32) ^ d ^ high;
    b = static_cast<uint32_t>(q), d = static_cast<uint32_t>(p);
    a = next_a, c = next_c;
    low += 0x9E3779B9u, high += 0xBB67AE85u;
  }
  return {{a, b, c, d}};
}

// Whose signs: bit i of word w of block e / 128 is that of element e = 128·block + 32·w + i; a set
// bit is +1.
struct Probe {
  uint64_t seed;
  uint32_t layer, probe;

  LWKD_ANYWHERE PhiloxWords block(int64_t block) const {
    return philox(
        seed, {{static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), layer, probe}});
  }
};

}  // namespace lwkd
