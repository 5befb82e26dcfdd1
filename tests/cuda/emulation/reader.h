// Integers read in order: what a driver is told of a call.
#pragma once

#include <cstdint>
#include <vector>

class Reader {
 public:
  explicit Reader(const int64_t* ints) : at_(ints) {}

  int64_t next() { return *at_++; }
  void* pointer() { return reinterpret_cast<void*>(next()); }
  std::vector<int64_t> list() {
    std::vector<int64_t> out(next());
    for (int64_t& x : out) x = next();
    return out;
  }

 private:
  const int64_t* at_;
};
