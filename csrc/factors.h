// What is given of one parameter of one network, and how its numbers come to lie side by side.
#pragma once

#include <cstdlib>
#include <memory>

#include "factor_arguments.h"
#include "pieces.h"
#include "products.h"

namespace lwkd {
namespace {

// One tensor of an item as matrices [N, G, rows, columns], of any strides.
struct View {
  char* data = nullptr;
  ScalarType dtype = ScalarType::Float;
  int64_t n = 0, g = 0, row = 0, column = 0;  // strides, in elements
};

// One parameter of one network: G = Σ_t d[t] a[t]ᵀ, group by group.
struct Item {
  Form form = kDense;
  int64_t samples = 0, groups = 1, rows = 0, inputs = 1, outputs = 1;
  View a, d;                                // of a convolution d alone
  const Tensor *x = nullptr, *y = nullptr;  // all numbers of both
  // Of a convolution: patches are taken of x; y is at their positions.
  Convolution conv;
  std::vector<int64_t> space, positions;  // of x as far as patches reach, and of y
  bool pointwise = false;                 // a patch is a position, and they lie in one stride

  // Every gradient is a vector: there are no products of matrices.
  bool thin() const { return form == kDense && (inputs == 1 || outputs == 1); }
};

inline View view_of(const Tensor& x) {
  return {static_cast<char*>(const_cast<void*>(x.const_data_ptr())), x.scalar_type(), x.stride(0)};
}

// The stride of all space dimensions taken as one, or -1 where they are not.
inline int64_t merged_stride(const Tensor& x) {
  int64_t step = -1, expected = -1;
  for (int64_t k = x.dim() - 1; k >= 2; --k) {
    if (x.size(k) == 1) continue;
    if (expected >= 0 && x.stride(k) != expected) return -1;
    if (step < 0) step = x.stride(k);
    expected = x.stride(k) * x.size(k);
  }
  return std::max<int64_t>(step, 0);
}

inline Item read_dense(const Tensor& a, const Tensor& d, bool indices) {
  Item item;
  item.form = indices ? kIndices : kDense;
  const int64_t at = d.dim() - 2;  // of T
  item.groups = at == 2 ? d.size(1) : 1;
  item.rows = d.size(at), item.outputs = d.size(at + 1);
  item.a = view_of(a), item.d = view_of(d);
  item.d.g = at == 2 ? d.stride(1) : 0;
  item.d.row = d.stride(at), item.d.column = d.stride(at + 1);
  item.a.g = at == 2 ? a.stride(1) : 0;
  item.a.row = a.stride(at);
  if (!indices) item.inputs = a.size(at + 1), item.a.column = a.stride(at + 1);
  return item;
}

inline Item read_convolution(const Tensor& a, const Tensor& d, const int64_t* form) {
  Item item;
  item.form = kConvolution;
  const int64_t space = a.dim() - 2, front = 3 - space;
  // A transposed convolution's gradient is that of an ordinary one from its output to its input.
  item.x = form[2] ? &d : &a, item.y = form[2] ? &a : &d;
  item.groups = item.conv.groups = form[1];
  std::vector<int64_t>* settings[] = {&item.conv.kernel, &item.conv.stride, &item.conv.padding,
                                      &item.conv.dilation};
  for (int k = 0; k < 4; ++k) {
    const int64_t* from = form + 3 + 3 * k + front;
    settings[k]->assign(from, from + space);
  }
  item.rows = 1;
  bool pointwise = true;
  for (int64_t k = 0; k < space; ++k) {
    const int64_t steps = item.y->size(2 + k), kernel = item.conv.kernel[k];
    const int64_t stride = item.conv.stride[k], padding = item.conv.padding[k];
    const int64_t reach = item.conv.dilation[k] * (kernel - 1) + 1;
    const int64_t needed = (steps - 1) * stride + reach - 2 * padding;
    const int64_t there = item.x->size(2 + k);
    // An output that is longer than the kernel's steps: what no patch reaches is left out.
    const bool longer = (there + 2 * padding - reach) / stride + 1 > steps;
    item.space.push_back(longer ? needed : there);
    item.positions.push_back(steps);
    item.rows *= steps;
    pointwise = pointwise && kernel == 1 && stride == 1 && padding == 0;
  }
  item.inputs = item.x->size(1) / item.groups * item.conv.taps();
  item.outputs = item.y->size(1) / item.groups;
  const int64_t x_step = merged_stride(*item.x), y_step = merged_stride(*item.y);
  item.pointwise = pointwise && x_step >= 0 && y_step >= 0;
  item.a = view_of(*item.x), item.d = view_of(*item.y);
  item.a.row = x_step, item.a.column = item.x->stride(1), item.a.g = item.inputs * item.a.column;
  item.d.row = y_step, item.d.column = item.y->stride(1), item.d.g = item.outputs * item.d.column;
  return item;
}

// A convolution by single positions is a product of matrices, where both networks lie so.
inline void simplify(Item& s, Item* t) {
  if (!s.pointwise || (t != nullptr && !t->pointwise)) return;
  s.form = kDense;
  if (t != nullptr) t->form = kDense;
}

// --- memory of one thread ---------------------------------------------------------------------

// Buffers by number, kept from task to task.
template <typename A>
class Scratch {
 public:
  A* get(int slot, int64_t count) {
    if (sizes_[slot] < count) {
      const size_t bytes = (count * sizeof(A) + 63) / 64 * 64;
      buffers_[slot].reset(static_cast<A*>(std::aligned_alloc(64, bytes)));
      STD_TORCH_CHECK(buffers_[slot], "lwkd.ops: jacobian_factors: no memory for ", bytes,
                      " bytes");
      sizes_[slot] = count;
    }
    return buffers_[slot].get();
  }
  const A* zeros(int64_t count) {
    if (sizes_[kZeros] < count) std::fill_n(get(kZeros, count), count, A(0));
    return buffers_[kZeros].get();
  }

 private:
  struct Free {
    void operator()(A* p) const { std::free(p); }
  };
  static constexpr int kSlots = 16, kZeros = kSlots - 1;
  std::array<std::unique_ptr<A, Free>, kSlots> buffers_;
  std::array<int64_t, kSlots> sizes_{};
};

// A block of a matrix.
struct Part {
  int64_t n = 0, g = 0, row = 0, rows = 0, column = 0, columns = 0;
};

// The lines of a block, along one dimension or the other.
struct Lines {
  Lines(const View& v, const Part& p, bool by_column)
      : count(by_column ? p.columns : p.rows),
        length(by_column ? p.rows : p.columns),
        stride(by_column ? v.row : v.column),
        dtype(v.dtype),
        start_(v.data +
               (p.n * v.n + p.g * v.g + p.row * v.row + p.column * v.column) * element_size(dtype)),
        step_((by_column ? v.column : v.row) * element_size(dtype)) {}

  const char* at(int64_t i) const { return start_ + i * step_; }
  // Whether all of them are one piece of memory, as type A.
  template <typename A>
  bool dense() const {
    return element_size(dtype) == sizeof(A) && (stride == 1 || length == 1) &&
           (step_ == length * int64_t(sizeof(A)) || count == 1);
  }

  int64_t count, length, stride;
  ScalarType dtype;

 private:
  const char* start_;
  int64_t step_;  // in bytes
};

// Numbers as type A: in place, or brought to a buffer.
template <typename A>
const A* line(const char* from, ScalarType dtype, int64_t stride, int64_t count, A* buffer) {
  if (element_size(dtype) == sizeof(A) && (stride == 1 || count == 1))
    return reinterpret_cast<const A*>(from);
  with_storage<A>(dtype, [&](auto type) {
    bring(reinterpret_cast<const decltype(type)*>(from), Runs{count, stride, 1, 0}, buffer);
  });
  return buffer;
}

constexpr int64_t kLine = 1024;  // numbers of a block's line at the most

inline bool lies_by_column(const View& v) { return v.row < v.column; }

// The block as it is, or times c.
template <typename A>
Matrix<A> block(const View& v, const Part& p, double c, A* buffer) {
  const bool by_column = lies_by_column(v);
  const Lines from(v, p, by_column);
  if (c == 1 && from.dense<A>())
    return {reinterpret_cast<const A*>(from.at(0)), p.rows, p.columns, by_column};
  for (int64_t i = 0; i < from.count; ++i) {
    A* to = buffer + i * from.length;
    const A* s = line(from.at(i), from.dtype, from.stride, from.length, to);
    if (c != 1)
      mix(to, s, nullptr, from.length, c, 0);
    else if (s != to)
      std::copy_n(s, from.length, to);
  }
  return {buffer, p.rows, p.columns, by_column};
}

// s − c·t, rounded once.
template <typename A>
Matrix<A> minus(const View& s, const View& t, const Part& p, double c, A* buffer) {
  const bool by_column = lies_by_column(s);
  const Lines first(s, p, by_column), second(t, p, by_column);
  alignas(64) A brought[2][kLine];
  for (int64_t i = 0; i < first.count; ++i) {
    const A* x = line(first.at(i), first.dtype, first.stride, first.length, brought[0]);
    const A* y = line(second.at(i), second.dtype, second.stride, second.length, brought[1]);
    mix(buffer + i * first.length, x, y, first.length, 1, -c);
  }
  return {buffer, p.rows, p.columns, by_column};
}

// Channels [first, last) of a sample's space, cut to `size`.
template <typename A>
Image<A> image(const Tensor& x, int64_t n, int64_t first, int64_t last,
               const std::vector<int64_t>& size, A* buffer) {
  Image<A> out{buffer, last - first, size};
  const ScalarType dtype = x.scalar_type();
  const int64_t space = size.size();
  bool dense = element_size(dtype) == sizeof(A);
  int64_t step = 1;
  for (int64_t k = space + 1; k >= 1; --k) {
    const int64_t extent = k == 1 ? out.channels : size[k - 2];
    dense = dense && (extent == 1 || x.stride(k) == step);
    step *= extent;
  }
  const char* data = static_cast<const char*>(x.const_data_ptr()) +
                     (n * x.stride(0) + first * x.stride(1)) * element_size(dtype);
  if (dense) {
    out.data = reinterpret_cast<const A*>(data);
    return out;
  }
  const int64_t inner = size.back(), outer = out.positions() / std::max<int64_t>(inner, 1);
  A* to = buffer;
  for (int64_t c = 0; c < out.channels; ++c)
    for (int64_t row = 0; row < outer; ++row, to += inner) {
      int64_t offset = c * x.stride(1), index = row;
      for (int64_t k = space - 2; k >= 0; --k) {
        offset += index % size[k] * x.stride(2 + k);
        index /= size[k];
      }
      const A* from =
          line(data + offset * element_size(dtype), dtype, x.stride(space + 1), inner, to);
      if (from != to) std::copy_n(from, inner, to);
    }
  return out;
}

template <typename A>
Image<A> mixed(const Image<A>& s, const Image<A>* t, double own, double other, A* buffer) {
  mix(buffer, s.data, t == nullptr ? nullptr : t->data, s.channels * s.positions(), own, other);
  return {buffer, s.channels, s.size};
}

// Patches of an image: columns [column, column + columns) of all (channel, tap), rows (positions)
// [row, row + rows).
template <typename A>
Matrix<A> patches(const Image<A>& x, const Item& item, const Part& p, A* buffer) {
  const Convolution& conv = item.conv;
  const int64_t taps = conv.taps(), space = x.size.size(), plane = x.positions();
  int64_t stride[3] = {1, 1, 1}, dilation[3] = {1, 1, 1}, padding[3] = {}, kernel[3] = {1, 1, 1};
  int64_t in[3] = {1, 1, 1}, out[3] = {1, 1, 1};
  for (int64_t k = 0, at = 3 - space; k < space; ++k, ++at) {
    stride[at] = conv.stride[k], dilation[at] = conv.dilation[k], padding[at] = conv.padding[k];
    kernel[at] = conv.kernel[k], in[at] = x.size[k], out[at] = item.positions[k];
  }
  A* to = buffer;
  for (int64_t column = p.column; column < p.column + p.columns; ++column) {
    const A* from = x.data + (column / taps - p.column / taps) * plane;
    const int64_t tap = column % taps;
    const int64_t shift[3] = {tap / (kernel[1] * kernel[2]) * dilation[0] - padding[0],
                              tap / kernel[2] % kernel[1] * dilation[1] - padding[1],
                              tap % kernel[2] * dilation[2] - padding[2]};
    for (int64_t row = p.row; row < p.row + p.rows;) {
      const int64_t w = row % out[2], h = row / out[2] % out[1], d = row / out[2] / out[1];
      const int64_t run = std::min(out[2] - w, p.row + p.rows - row);
      const int64_t id = d * stride[0] + shift[0], ih = h * stride[1] + shift[1];
      if (id < 0 || id >= in[0] || ih < 0 || ih >= in[1]) {
        std::fill_n(to, run, A(0));
      } else {
        const A* base = from + (id * in[1] + ih) * in[2];
        for (int64_t i = 0; i < run; ++i) {
          const int64_t iw = (w + i) * stride[2] + shift[2];
          to[i] = iw >= 0 && iw < in[2] ? base[iw] : A(0);
        }
      }
      to += run, row += run;
    }
  }
  return {buffer, p.rows, p.columns, true};
}

}  // namespace
}  // namespace lwkd
