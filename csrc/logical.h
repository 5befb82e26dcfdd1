// A tensor's elements in their logical order, whatever order its memory has.
#pragma once

#include <algorithm>
#include <vector>

#include "common.h"
#include "pieces.h"
#include "schedule.h"

namespace lwkd {
namespace {

constexpr int64_t kRun = 256, kAbreast = kTile / kRun;  // elements of a run, runs of a tile

// A tensor's elements in their logical order; neighbouring dimensions merged where memory allows.
class Logical {
 public:
  // Of `x` without its first `skip` dimensions, at index `at` of the first of them.
  Logical(const Tensor& x, int64_t skip, int64_t at) : dtype(x.scalar_type()) {
    data = static_cast<char*>(const_cast<void*>(x.const_data_ptr()));
    if (skip > 0) data += at * x.stride(0) * element_size(dtype);
    for (int64_t d = skip; d < x.dim(); ++d) {
      length *= x.size(d);
      if (x.size(d) == 1) continue;
      if (!size_.empty() && stride_.back() == x.size(d) * x.stride(d))
        size_.back() *= x.size(d), stride_.back() = x.stride(d);
      else
        size_.push_back(x.size(d)), stride_.push_back(x.stride(d));
    }
    along = find_along();
  }

  // Elements begin, begin + 1, … as numbers of type A, where they lie so.
  template <typename A>
  A* direct(int64_t begin) const {
    const bool same =
        element_size(dtype) == sizeof(A) && size_.size() <= 1 && (size_.empty() || stride_[0] == 1);
    return same ? reinterpret_cast<A*>(data) + begin : nullptr;
  }

  // Calls run(address, runs, first) for what covers [begin, end).
  template <typename Run>
  void cover(int64_t begin, int64_t end, const Run& run) const {
    cover_grid(
        size_, [&](int64_t d) { return stride_[d]; }, begin, end,
        [&](int64_t offset, Runs runs, int64_t first) {
          run(data + offset * element_size(dtype), runs, first);
        });
  }

  // What is to be covered by tiles of kTile.
  int64_t positions() const {
    if (along < 0) return length;
    const int64_t run = behind(along), outer = length / (run * size_[along]);
    return outer * parts(size_[along], kAbreast) * parts(run, kRun) * kTile;
  }

  // Calls each(begin, count, numbers) for the runs of a tile of this kind, brought to `buffer`.
  template <typename A, typename Each>
  void abreast(int64_t tile, A* buffer, const Each& each) const {
    const int64_t size = size_[along], step = stride_[along], run = behind(along);
    const int64_t pieces = parts(run, kRun), groups = parts(size, kAbreast);
    const int64_t at = tile / pieces % groups * kAbreast, from = tile % pieces * kRun;
    const int64_t rows = std::min(kAbreast, size - at), count = std::min(kRun, run - from);
    const int64_t first = (tile / pieces / groups * size + at) * run + from;
    cover(first, first + count, [&](char* here, Runs runs, int64_t begin) {
      with_storage<A>(dtype, [&](auto stored) {
        const auto* x = reinterpret_cast<const decltype(stored)*>(here);
        for (int64_t r = 0; r < runs.rows; ++r, x += runs.row_stride, begin += runs.count)
          for (int64_t q = 0; q < runs.count; ++q) {
            // Too far from the one before for a processor to see it coming.
            __builtin_prefetch(x + (q + 16) * runs.stride);
            for (int64_t k = 0; k < rows; ++k)
              buffer[k * kRun + begin + q] = static_cast<A>(widen(x[k * step + q * runs.stride]));
          }
      });
    });
    for (int64_t k = 0; k < rows; ++k) each(first + k * run, count, buffer + k * kRun);
  }

  char* data;
  ScalarType dtype;
  int64_t length = 1;
  // The dimension whose neighbours are closest in memory, where it is not the last one: kAbreast
  // runs behind it are read together, or a line of memory would be asked for once a run. Else -1.
  int64_t along = -1;

 private:
  static int64_t parts(int64_t whole, int64_t each) { return (whole + each - 1) / each; }

  int64_t behind(int64_t d) const {  // how many elements a run behind dimension d has
    int64_t run = 1;
    for (size_t k = d + 1; k < size_.size(); ++k) run *= size_[k];
    return run;
  }

  int64_t find_along() const {
    constexpr int64_t kNear = 16;
    const int64_t last = int64_t(size_.size()) - 1;
    if (length == 0 || last < 1) return -1;
    const auto least = std::min_element(stride_.begin(), stride_.begin() + last);
    const int64_t d = least - stride_.begin();
    const bool closer = *least > 0 && *least <= kNear && *least < stride_[last];
    return closer && behind(d) >= kRun ? d : -1;
  }

  std::vector<int64_t> size_, stride_;
};

}  // namespace
}  // namespace lwkd
