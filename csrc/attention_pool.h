// What stands between a raw map and the common space of its pair: pooling, its transpose, masks.
#pragma once

#include <vector>

#include "operand.h"

namespace lwkd {

inline bool same_space(const Operand& o, const int64_t* space) {
  return o.size[0] == space[0] && o.size[1] == space[1] && o.size[2] == space[2];
}

// Adaptive average pooling of one sample's map.
template <typename A>
void pool(const A* raw, const int64_t* in, A* out, const int64_t* space) {
  for (int64_t i = 0, at = 0; i < space[0]; ++i)
    for (int64_t j = 0; j < space[1]; ++j)
      for (int64_t k = 0; k < space[2]; ++k, ++at) {
        const int64_t i0 = cell_begin(i, in[0], space[0]), i1 = cell_end(i, in[0], space[0]);
        const int64_t j0 = cell_begin(j, in[1], space[1]), j1 = cell_end(j, in[1], space[1]);
        const int64_t k0 = cell_begin(k, in[2], space[2]), k1 = cell_end(k, in[2], space[2]);
        double sum = 0;
        for (int64_t a = i0; a < i1; ++a)
          for (int64_t b = j0; b < j1; ++b)
            for (int64_t c = k0; c < k1; ++c) sum += raw[(a * in[1] + b) * in[2] + c];
        out[at] = static_cast<A>(sum / double((i1 - i0) * (j1 - j0) * (k1 - k0)));
      }
}

// Its transpose: raw position r gets the share of every cell that contains it.
template <typename A>
void unpool(const A* cells, const int64_t* space, A* raw, const int64_t* in) {
  for (int64_t q = 0; q < in[0] * in[1] * in[2]; ++q) raw[q] = 0;
  for (int64_t i = 0, at = 0; i < space[0]; ++i)
    for (int64_t j = 0; j < space[1]; ++j)
      for (int64_t k = 0; k < space[2]; ++k, ++at) {
        const int64_t i0 = cell_begin(i, in[0], space[0]), i1 = cell_end(i, in[0], space[0]);
        const int64_t j0 = cell_begin(j, in[1], space[1]), j1 = cell_end(j, in[1], space[1]);
        const int64_t k0 = cell_begin(k, in[2], space[2]), k1 = cell_end(k, in[2], space[2]);
        const A share = cells[at] / static_cast<A>((i1 - i0) * (j1 - j0) * (k1 - k0));
        for (int64_t a = i0; a < i1; ++a)
          for (int64_t b = j0; b < j1; ++b)
            for (int64_t c = k0; c < k1; ++c) raw[(a * in[1] + b) * in[2] + c] += share;
      }
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
