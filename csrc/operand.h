// One activation tensor, read in place as [N, C, d0, d1, d2] whatever its strides.
#pragma once

#include <algorithm>
#include <vector>

#include "common.h"

namespace lwkd {

inline int64_t element_size(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

inline bool any_double(const std::vector<Tensor>& xs) {
  for (const Tensor& x : xs)
    if (x.scalar_type() == ScalarType::Double) return true;
  return false;
}

// What a call computes in: `like` gives the device.
inline Tensor make(const Tensor& like, const std::vector<int64_t>& size, bool wide) {
  return torch::stable::new_empty(like, size, wide ? ScalarType::Double : ScalarType::Float);
}

struct Operand {
  void* data;
  ScalarType dtype;
  int64_t n, c;                           // samples, channels
  int64_t size[3];                        // space, padded with leading ones
  int64_t stride_n, stride_c, stride[3];  // in elements
  int64_t prefix;                         // leading tokens dropped before `data`
  int64_t stride_token;                   // stride of the token dimension, where prefix > 0

  int64_t positions() const { return size[0] * size[1] * size[2]; }
};

// `layout`: channel dimension, prefix, h, w (h = 0: space is not folded). `argument` and `layer`
// name the tensor in an error.
inline Operand read_operand(const Tensor& x, const int64_t* layout, const char* argument,
                            int64_t layer) {
  const int64_t channel = layout[0], prefix = layout[1], h = layout[2], w = layout[3];
  const auto sizes = x.sizes();
  const auto strides = x.strides();
  const int64_t dim = x.dim();
  Operand o{};
  o.data = const_cast<void*>(x.const_data_ptr());
  o.dtype = x.scalar_type();
  // Not what torch makes, but what numpy can hand it; vector loads would fault.
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(o.data) % element_size(o.dtype) == 0,
                  "lwkd.ops: ", argument, " (layer ", layer, "): expected data aligned to ",
                  element_size(o.dtype), " bytes, got a tensor that is not; pass a clone()");
  o.n = sizes[0];
  o.c = sizes[channel];
  o.stride_n = strides[0];
  o.stride_c = strides[channel];
  for (int i = 0; i < 3; ++i) o.size[i] = 1, o.stride[i] = 0;
  if (h > 0) {
    const int64_t token = 3 - channel;
    o.size[1] = h, o.size[2] = w;
    o.stride[1] = strides[token] * w, o.stride[2] = strides[token];
    o.prefix = prefix;
    o.stride_token = strides[token];
  } else {
    int at = 2;
    for (int64_t d = dim - 1; d > 0; --d) {
      if (d == channel) continue;
      o.size[at] = sizes[d], o.stride[at] = strides[d];
      --at;
    }
  }
  if (prefix > 0)
    o.data = static_cast<char*>(o.data) + prefix * o.stride_token * element_size(o.dtype);
  return o;
}

// Where adaptive average pooling's cell `i` of `out` begins and ends in `in` positions.
inline int64_t cell_begin(int64_t i, int64_t in, int64_t out) { return i * in / out; }
inline int64_t cell_end(int64_t i, int64_t in, int64_t out) {
  return ((i + 1) * in + out - 1) / out;
}

// One layer: both operands, the common space, and where its maps lie in the flat buffer.
struct Layer {
  Operand side[2];
  int64_t space[3];
  int64_t cells;        // positions of the common space
  int64_t maps_offset;  // student's [N, cells] here, teacher's right behind it
};

inline std::vector<Layer> read_layers(const std::vector<Tensor>& student,
                                      const std::vector<Tensor>& teacher,
                                      const std::vector<int64_t>& student_layout,
                                      const std::vector<int64_t>& teacher_layout) {
  std::vector<Layer> layers(student.size());
  int64_t offset = 0;
  for (size_t l = 0; l < layers.size(); ++l) {
    Layer& layer = layers[l];
    layer.side[0] = read_operand(student[l], &student_layout[4 * l], "student", l);
    layer.side[1] = read_operand(teacher[l], &teacher_layout[4 * l], "teacher", l);
    layer.cells = 1;
    for (int i = 0; i < 3; ++i) {
      layer.space[i] = std::min(layer.side[0].size[i], layer.side[1].size[i]);
      layer.cells *= layer.space[i];
    }
    layer.maps_offset = offset;
    offset += 2 * layer.side[0].n * layer.cells;
  }
  return layers;
}

}  // namespace lwkd
