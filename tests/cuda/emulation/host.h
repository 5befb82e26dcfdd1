// A launcher for the emulator: memory that was never written is NaN.
#pragma once

#include <cstring>
#include <memory>

#include "emulator.h"

class HostLauncher {
 public:
  explicit HostLauncher(unsigned seed) : seed_(seed) {}

  void* allocate(int64_t bytes) {
    scratch_.reset(static_cast<char*>(std::aligned_alloc(16, std::max<int64_t>(bytes, 16))));
    std::memset(scratch_.get(), 0xff, bytes);  // uninitialised: NaN
    return scratch_.get();
  }
  void clear(void* data, int64_t bytes) {
    if (bytes > 0) std::memset(data, 0, bytes);
  }
  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared,
              const Arguments&... arguments) {
    emulator::launch(blocks, threads, shared, seed_++, [&] { kernel(arguments...); });
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  unsigned seed_;
  std::unique_ptr<char, Free> scratch_;
};
