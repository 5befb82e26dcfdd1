// One activation tensor, read in place as [N, C, d0, d1, d2] whatever its strides.
#pragma once

#include <algorithm>
#include <vector>

#include "common.h"

namespace lwkd {

inline bool any_double(const std::vector<Tensor>& xs) {
  for (const Tensor& x : xs)
    if (x.scalar_type() == ScalarType::Double) return true;
  return false;
}

// What a call computes in: `like` gives the device.
inline Tensor make(const Tensor& like, const std::vector<int64_t>& size, bool wide) {
  return torch::stable::new_empty(like, size, wide ? ScalarType::Double : ScalarType::Float);
}

// Of one distance: reads grad, [L] (of the mean) or [L, N], float or double, of any strides.
inline double gradient_at(const Tensor& grad, int64_t layer, int64_t n, int64_t samples) {
  const int64_t at = layer * grad.stride(0) + (grad.dim() == 1 ? 0 : n * grad.stride(1));
  const void* data = grad.const_data_ptr();
  const double g = grad.scalar_type() == ScalarType::Double ? static_cast<const double*>(data)[at]
                                                            : static_cast<const float*>(data)[at];
  return grad.dim() == 1 ? g / double(samples) : g;
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
  o.dtype = x.scalar_type();
  const bool floating = o.dtype == ScalarType::Double || o.dtype == ScalarType::Float ||
                        o.dtype == ScalarType::Half || o.dtype == ScalarType::BFloat16;
  STD_TORCH_CHECK(floating, "lwkd.ops: ", argument, " (layer ", layer,
                  "): expected float64, float32, float16 or bfloat16, got another dtype");
  STD_TORCH_CHECK(dim >= 2 && dim <= 5 && channel >= 1 && channel < dim, "lwkd.ops: ", argument,
                  " (layer ", layer, "): expected two to five dimensions and a channel dimension ",
                  "among them, got ", dim, " and ", channel);
  STD_TORCH_CHECK(
      h == 0 || (h > 0 && w > 0 && prefix >= 0 && dim == 3 && sizes[3 - channel] == prefix + h * w),
      "lwkd.ops: ", argument, " (layer ", layer, "): expected three dimensions with ", prefix,
      " + ", h, "·", w, " tokens, got another shape");
  o.data = const_cast<void*>(x.const_data_ptr());
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
  const size_t length = student.size();
  STD_TORCH_CHECK(length > 0 && teacher.size() == length && student_layout.size() == 4 * length &&
                      teacher_layout.size() == 4 * length,
                  "lwkd.ops: teacher: expected ", length,
                  " tensors and four numbers of layout for ", "each of student and teacher, got ",
                  teacher.size(), ", ", student_layout.size(), " and ", teacher_layout.size());
  std::vector<Layer> layers(length);
  int64_t offset = 0;
  for (size_t l = 0; l < layers.size(); ++l) {
    Layer& layer = layers[l];
    layer.side[0] = read_operand(student[l], &student_layout[4 * l], "student", l);
    layer.side[1] = read_operand(teacher[l], &teacher_layout[4 * l], "teacher", l);
    for (const Operand& side : layer.side)
      STD_TORCH_CHECK(side.n == layers[0].side[0].n, "lwkd.ops: student, teacher (layer ", l,
                      "): expected batch size ", layers[0].side[0].n, ", got ", side.n);
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

// Masks are none at all, or one a layer: bool [N, *common space], or one-dimensional for none.
inline void check_mask(const std::vector<Tensor>& mask, size_t layer, int64_t samples,
                       const int64_t* space) {
  if (mask.empty()) return;
  STD_TORCH_CHECK(layer < mask.size(), "lwkd.ops: mask: expected one a layer, got ", mask.size());
  const Tensor& m = mask[layer];
  if (m.dim() < 2) return;
  bool fits = m.scalar_type() == ScalarType::Bool && m.dim() <= 4 && m.size(0) == samples;
  for (int64_t d = m.dim() - 1, at = 2; fits && at >= 0; --d, --at)
    fits = (d > 0 ? m.size(d) : 1) == space[at];
  STD_TORCH_CHECK(fits, "lwkd.ops: mask (layer ", layer, "): expected bool [", samples,
                  ", *common space], got another shape or dtype");
}

// What attention_backward is given has to fit together: the kernels go by it without looking.
// Returns xs, read.
inline std::vector<Operand> read_gradient_lists(const Tensor& grad, const std::vector<Tensor>& xs,
                                                const std::vector<Tensor>& mask, const Tensor& maps,
                                                const std::vector<int64_t>& layers,
                                                const std::vector<int64_t>& sides,
                                                const std::vector<int64_t>& layout,
                                                const std::vector<int64_t>& space) {
  const int64_t length = space.size() / 3, count = xs.size();
  STD_TORCH_CHECK(count > 0 && space.size() % 3 == 0 && layers.size() == xs.size() &&
                      sides.size() == xs.size() && layout.size() == 4 * xs.size(),
                  "lwkd.ops: attention_backward: xs: expected at least one, with a layer, a side ",
                  "and four numbers of layout each, got ", count);
  const int64_t samples = xs[0].size(0);
  int64_t cells = 0;
  for (int64_t l = 0; l < length; ++l) {
    cells += space[3 * l] * space[3 * l + 1] * space[3 * l + 2];
    check_mask(mask, l, samples, &space[3 * l]);
  }
  STD_TORCH_CHECK(maps.is_contiguous() && maps.numel() == 2 * samples * cells,
                  "lwkd.ops: attention_backward: maps: expected ", 2 * samples * cells,
                  " numbers in a row, got ", maps.numel());
  STD_TORCH_CHECK(
      grad.scalar_type() == maps.scalar_type() &&
          (maps.scalar_type() == ScalarType::Float || maps.scalar_type() == ScalarType::Double),
      "lwkd.ops: attention_backward: grad: expected the dtype of maps");
  STD_TORCH_CHECK(
      (grad.dim() == 1 || (grad.dim() == 2 && grad.size(1) == samples)) && grad.size(0) == length,
      "lwkd.ops: attention_backward: grad: expected [L] or [L, N]");
  std::vector<Operand> operands;
  for (int64_t i = 0; i < count; ++i) {
    operands.push_back(read_operand(xs[i], &layout[4 * i], "xs", i));
    const Operand& x = operands.back();
    bool fits = layers[i] >= 0 && layers[i] < length && (sides[i] == 0 || sides[i] == 1);
    for (int d = 0; fits && d < 3; ++d) fits = space[3 * layers[i] + d] <= x.size[d];
    STD_TORCH_CHECK(fits && x.n == samples, "lwkd.ops: attention_backward: xs (layer ", i,
                    "): expected a tensor of its layer's space, got another shape");
  }
  return operands;
}

}  // namespace lwkd
