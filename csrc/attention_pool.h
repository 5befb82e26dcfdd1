// What stands between a raw map and the common space of its pair: pooling, its transpose, masks.
#pragma once

#include <vector>

#include "operand.h"

namespace lwkd {

inline bool same_space(const Operand& o, const int64_t* space) {
  return o.size[0] == space[0] && o.size[1] == space[1] && o.size[2] == space[2];
}

// Calls run(cell, count, each) for every cell of `space`: it averages `count` positions of `in`,
// and each(f) calls f(position) for all of them.
template <typename Run>
void each_cell(const int64_t* in, const int64_t* space, const Run& run) {
  int64_t at[3], begin[3], end[3], cell = 0;
  const auto bound = [&](int d) {
    begin[d] = cell_begin(at[d], in[d], space[d]);
    end[d] = cell_end(at[d], in[d], space[d]);
  };
  const auto each = [&](const auto& f) {
    for (int64_t a = begin[0]; a < end[0]; ++a)
      for (int64_t b = begin[1]; b < end[1]; ++b)
        for (int64_t c = begin[2]; c < end[2]; ++c) f((a * in[1] + b) * in[2] + c);
  };
  for (at[0] = 0; at[0] < space[0]; ++at[0]) {
    bound(0);
    for (at[1] = 0; at[1] < space[1]; ++at[1]) {
      bound(1);
      for (at[2] = 0; at[2] < space[2]; ++at[2], ++cell) {
        bound(2);
        run(cell, (end[0] - begin[0]) * (end[1] - begin[1]) * (end[2] - begin[2]), each);
      }
    }
  }
}

// Adaptive average pooling of one sample's map.
template <typename A>
void pool(const A* raw, const int64_t* in, A* out, const int64_t* space) {
  each_cell(in, space, [&](int64_t cell, int64_t count, const auto& each) {
    double sum = 0;
    each([&](int64_t q) { sum += raw[q]; });
    out[cell] = static_cast<A>(sum / double(count));
  });
}

// Its transpose: raw position q gets the share of every cell that contains it.
template <typename A>
void unpool(const A* cells, const int64_t* space, A* raw, const int64_t* in) {
  for (int64_t q = 0; q < in[0] * in[1] * in[2]; ++q) raw[q] = 0;
  each_cell(in, space, [&](int64_t cell, int64_t count, const auto& each) {
    const A share = cells[cell] / static_cast<A>(count);
    each([&](int64_t q) { raw[q] += share; });
  });
}

// One layer's mask: bool [N, *space] of any strides, or none.
struct Mask {
  const uint8_t* data = nullptr;
  int64_t stride_n = 0, size[3] = {1, 1, 1}, stride[3] = {0, 0, 0};

  Mask() = default;
  explicit Mask(const Tensor& mask) {
    const int64_t dim = mask.dim();
    if (dim < 2) return;  // a one-dimensional tensor stands for none
    data = static_cast<const uint8_t*>(mask.const_data_ptr());
    stride_n = mask.stride(0);
    for (int64_t d = dim - 1, at = 2; d > 0; --d, --at)
      size[at] = mask.size(d), stride[at] = mask.stride(d);
  }

  // One byte a position of sample n into `keep`; how many are left in `kept`.
  const uint8_t* read(int64_t n, std::vector<uint8_t>& keep, int64_t cells, int64_t& kept) const {
    kept = cells;
    if (data == nullptr) return nullptr;
    keep.resize(cells);
    kept = 0;
    for (int64_t i = 0, at = 0; i < size[0]; ++i)
      for (int64_t j = 0; j < size[1]; ++j)
        for (int64_t k = 0; k < size[2]; ++k, ++at) {
          keep[at] = data[n * stride_n + i * stride[0] + j * stride[1] + k * stride[2]];
          kept += keep[at];
        }
    return keep.data();
  }
};

inline std::vector<Mask> read_masks(const std::vector<Tensor>& mask, size_t layers) {
  std::vector<Mask> out;
  for (size_t l = 0; l < layers; ++l) out.push_back(mask.empty() ? Mask() : Mask(mask[l]));
  return out;
}

}  // namespace lwkd
