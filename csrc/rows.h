// Tensors of one shape [N, ...] walked together, row by row, in the order that the first one's
// memory has.
#pragma once

#include <array>
#include <vector>

#include "common.h"
#include "lanes.h"
#include "operand.h"
#include "schedule.h"

namespace lwkd {

// What a walk reads or writes.
struct Stream {
  char* data;
  ScalarType dtype;
  int64_t stride_n;  // in elements
};

// `rows` runs of elements of one stride.
struct Runs {
  int64_t count, stride;  // of a run, in elements
  int64_t rows, row_stride;
};

// Calls run(offset, runs, first) for the runs, along the last dimension, that cover elements
// [begin, end) of a grid, as many rows of them at once as there are; strides(d) of dimension d.
template <typename Strides, typename Run>
void cover_grid(const std::vector<int64_t>& size, const Strides& strides, int64_t begin,
                int64_t end, const Run& run) {
  const int64_t last = int64_t(size.size()) - 1;
  if (last < 0) return run(0, Runs{end - begin, 0, 1, 0}, 0);
  const int64_t inner = size[last], step = strides(last);
  const int64_t outer = last > 0 ? size[last - 1] : 1, row_step = last > 0 ? strides(last - 1) : 0;
  for (int64_t at = begin; at < end;) {
    const int64_t skipped = at % inner, row = at / inner % outer;
    int64_t offset = skipped * step + row * row_step, index = at / inner / outer;
    for (int64_t d = last - 2; d >= 0; --d) {
      offset += index % size[d] * strides(d);
      index /= size[d];
    }
    const bool whole = skipped == 0 && end - at >= inner;
    const int64_t rows = whole ? std::min(outer - row, (end - at) / inner) : 1;
    const int64_t count = std::min(inner - skipped, end - at);
    run(offset, Runs{count, step, rows, row_step}, at - begin);
    at += rows * count;
  }
}

// The dimensions of a row, outermost first, merged where no tensor has a gap between them.
struct RowWalk {
  int64_t n = 0, length = 1;  // rows, elements of a row
  std::vector<Stream> streams;
  std::vector<int64_t> size;
  std::vector<std::array<int64_t, 3>> stride;  // of each dimension, stream by stream

  explicit RowWalk(const std::vector<const Tensor*>& tensors) : n(tensors[0]->size(0)) {
    const int64_t dim = tensors[0]->dim(), count = tensors.size();
    for (const Tensor* t : tensors)
      streams.push_back({static_cast<char*>(const_cast<void*>(t->const_data_ptr())),
                         t->scalar_type(), t->stride(0)});
    std::vector<int64_t> order;
    for (int64_t d = 1; d < dim; ++d) {
      length *= tensors[0]->size(d);
      if (tensors[0]->size(d) != 1) order.push_back(d);
    }
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return tensors[0]->stride(a) > tensors[0]->stride(b);
    });
    for (const int64_t d : order) {
      const int64_t extent = tensors[0]->size(d);
      std::array<int64_t, 3> step{};
      for (int64_t k = 0; k < count; ++k) step[k] = tensors[k]->stride(d);
      bool merges = !size.empty();
      for (int64_t k = 0; merges && k < count; ++k) merges = stride.back()[k] == extent * step[k];
      if (merges)
        size.back() *= extent, stride.back() = step;
      else
        size.push_back(extent), stride.push_back(step);
    }
  }

  // Where elements begin, begin + 1, … of a row lie one behind the other, as numbers of type A.
  template <typename A>
  A* direct(int k, int64_t row, int64_t begin) const {
    const bool same = element_size(streams[k].dtype) == sizeof(A) && size.size() <= 1 &&
                      (size.empty() || stride[0][k] == 1);
    return same ? reinterpret_cast<A*>(streams[k].data) + row * streams[k].stride_n + begin
                : nullptr;
  }

  // Calls run(address, runs, first) for what covers elements [begin, end) of stream k.
  template <typename Run>
  void cover(int k, int64_t row, int64_t begin, int64_t end, const Run& run) const {
    const Stream& s = streams[k];
    char* data = s.data + row * s.stride_n * element_size(s.dtype);
    cover_grid(
        size, [&](int64_t d) { return stride[d][k]; }, begin, end,
        [&](int64_t offset, Runs runs, int64_t first) {
          run(data + offset * element_size(s.dtype), runs, first);
        });
  }
};

}  // namespace lwkd
