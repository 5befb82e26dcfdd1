// Runs a CUDA kernel on the host: every thread of a block is a coroutine, so that __syncthreads and
// warp shuffles mean what they mean on a GPU. Blocks run one after another in a scrambled order,
// and so do the threads between two barriers: a missing barrier shows as a result that depends on
// the seed. It is stricter than a GPU: all threads of a block must reach each barrier at the same
// line, and all lanes of a warp each shuffle.
#pragma once

#include <math.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#include "stacks.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __grid_constant__
#define __launch_bounds__(...)

struct Dim3 {
  unsigned x = 0, y = 0, z = 0;
};
inline Dim3 threadIdx, blockIdx, blockDim, gridDim;

struct uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace emulator {

[[noreturn]] inline void fail(const char* what, int line) {
  std::fprintf(stderr, "emulator: %s (line %d)\n", what, line);
  std::abort();
}

struct Fiber {
  Place place;
  std::vector<char> stack;
  bool finished;
  const unsigned* barrier;  // whose generation must change before it goes on
  unsigned generation;
  void* fake_stack;

  bool ready() const { return !finished && (barrier == nullptr || *barrier != generation); }
};

struct Warp {
  uint64_t deposit[32], result[32];
  unsigned arrived, generation;
  int line;
};

// One block at a time.
struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<char> shared;
  std::function<void()> body;
  std::mt19937 random;
  Place scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  void* scheduler_fake_stack = nullptr;
  unsigned threads = 0, arrived = 0, generation = 0, left = 0, current = 0;
  int line = 0;
  bool progress = false;
};
inline Machine machine;

inline void* shared_memory() { return machine.shared.data(); }

inline void to_scheduler(bool last) {
  Fiber& fiber = machine.fibers[machine.current];
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &fiber.fake_stack, machine.scheduler_stack,
                                 machine.scheduler_stack_size);
#endif
  (void)last;
  change(fiber.place, machine.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
}

inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_stack_size);
#endif
  machine.body();
  machine.fibers[machine.current].finished = true;
  machine.progress = true;
  ++machine.left;
  to_scheduler(true);
}

inline void resume(unsigned thread) {
  machine.current = thread;
  threadIdx.x = thread;
  Fiber& fiber = machine.fibers[thread];
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine.scheduler_fake_stack, fiber.stack.data(),
                                 fiber.stack.size());
#endif
  change(machine.scheduler, fiber.place);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine.scheduler_fake_stack, nullptr, nullptr);
#endif
}

// Until the last one arrives.
inline void wait(const unsigned& barrier, unsigned generation) {
  Fiber& fiber = machine.fibers[machine.current];
  fiber.generation = generation;
  fiber.barrier = &barrier;
  if (barrier == generation) to_scheduler(false);
  fiber.barrier = nullptr;
}

inline void sync_block(int line) {
  Machine& m = machine;
  if (m.left > 0) fail("threads left before a barrier", line);
  if (m.arrived > 0 && m.line != line) fail("threads at different barriers", line);
  m.line = line;
  m.progress = true;
  const unsigned generation = m.generation;
  if (++m.arrived == m.threads) {
    m.arrived = 0;
    ++m.generation;
  }
  wait(m.generation, generation);
}

template <typename T>
T shuffle_xor(unsigned mask, T value, int lane_mask, int line) {
  if (mask != 0xffffffffu) fail("only whole warps shuffle here", line);
  Warp& warp = machine.warps[machine.current / 32];
  const unsigned lane = machine.current % 32;
  if (warp.arrived > 0 && warp.line != line) fail("lanes at different shuffles", line);
  warp.line = line;
  machine.progress = true;
  std::memcpy(&warp.deposit[lane], &value, sizeof(T));
  const unsigned generation = warp.generation;
  if (++warp.arrived == 32) {
    std::copy_n(warp.deposit, 32, warp.result);
    warp.arrived = 0;
    ++warp.generation;
  }
  wait(warp.generation, generation);
  std::memcpy(&value, &warp.result[lane ^ static_cast<unsigned>(lane_mask)], sizeof(T));
  return value;
}

inline void run_block() {
  Machine& m = machine;
  std::fill(m.shared.begin(), m.shared.end(), '\xff');  // uninitialised: NaN
  m.arrived = m.left = 0;
  m.warps.assign(m.threads / 32, Warp{});
  for (unsigned t = 0; t < m.threads; ++t) {
    Fiber& fiber = m.fibers[t];
    fiber.finished = false;
    fiber.barrier = nullptr;
    fiber.fake_stack = nullptr;
    fiber.stack.resize(64 * 1024);
    begin(fiber.place, fiber.stack.data(), fiber.stack.size(), fiber_main);
  }
  std::vector<unsigned> order(m.threads);
  std::iota(order.begin(), order.end(), 0u);
  bool all = false;  // in a round where nothing moves every warp must have had its turn
  while (m.left < m.threads) {
    m.progress = false;
    const unsigned resting =
        all ? 0u : static_cast<unsigned>(m.random());  // warps that fall behind
    std::shuffle(order.begin(), order.end(), m.random);
    for (unsigned t : order)
      if (m.fibers[t].ready() && (resting >> t / 32 & 1u) == 0) resume(t);
    if (!m.progress && all) fail("deadlock", m.line);
    all = !m.progress;
  }
  if (m.arrived > 0) fail("a barrier that not all threads reach", m.line);
}

inline void launch(int64_t blocks, int threads, int64_t shared, unsigned seed,
                   std::function<void()> body) {
  if (threads % 32 != 0 || threads < 32 || threads > 1024) fail("a bad block size", 0);
  if (blocks < 1 || blocks > INT32_MAX) fail("a bad grid size", 0);
  Machine& m = machine;
  m.random.seed(seed);
  m.threads = static_cast<unsigned>(threads);
  m.body = std::move(body);
  m.fibers.resize(std::max<size_t>(m.fibers.size(), m.threads));
  m.shared = std::vector<char>(shared);  // its own allocation, so that an overrun is seen
  gridDim.x = static_cast<unsigned>(blocks);
  blockDim.x = m.threads;
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), m.random);
  for (unsigned block : order) {
    blockIdx.x = block;
    run_block();
  }
}

}  // namespace emulator

// --- what device code calls
// ------------------------------------------------------------------------

#define __syncthreads() emulator::sync_block(__LINE__)
#define __shfl_xor_sync(mask, value, lane_mask) \
  emulator::shuffle_xor(mask, value, lane_mask, __LINE__)
inline void __threadfence() {}
inline int atomicAdd(int* p, int x) {
  const int old = *p;
  *p += x;
  return old;
}
template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}

template <typename To, typename From>
To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline float __uint_as_float(uint32_t x) { return bits_of<float>(x); }
inline uint32_t __float_as_uint(float x) { return bits_of<uint32_t>(x); }
inline double __hiloint2double(int high, int low) {
  return bits_of<double>(static_cast<uint64_t>(static_cast<uint32_t>(high)) << 32 |
                         static_cast<uint32_t>(low));
}
inline int __double2loint(double x) { return static_cast<int>(bits_of<uint64_t>(x)); }
inline int __double2hiint(double x) { return static_cast<int>(bits_of<uint64_t>(x) >> 32); }
inline double __dmul_rn(double a, double b) {
  volatile double product = a * b;  // never contracted, as on the device
  return product;
}

inline float half_to_float(uint16_t bits) { return static_cast<float>(bits_of<_Float16>(bits)); }
inline uint32_t two_halves(float low, float high) {
  return bits_of<uint16_t>(static_cast<_Float16>(low)) |
         static_cast<uint32_t>(bits_of<uint16_t>(static_cast<_Float16>(high))) << 16;
}
inline uint32_t bfloat16_bits(float x) {  // to nearest even; NaN as the device makes it
  const uint32_t u = bits_of<uint32_t>(x);
  return x != x ? 0x7fffu : (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
}
inline uint32_t two_bfloat16s(float low, float high) {
  return bfloat16_bits(low) | bfloat16_bits(high) << 16;
}
