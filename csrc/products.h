// Products of matrices and gradients of convolutions: the library's, each called by one thread of
// ours, so that what comes out does not depend on how many threads there are.
#pragma once

#include <dlfcn.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "common.h"
#include "numeric.h"

namespace lwkd {

// A tensor over memory that somebody else keeps.
template <typename A>
Tensor borrow(const A* data, const std::vector<int64_t>& sizes,
              const std::vector<int64_t>& strides) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
      const_cast<A*>(data), sizes.size(), sizes.data(), strides.data(), 0,
      std::is_same_v<A, double> ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Numbers without gaps: element (r, c) at r · columns + c, or (by_column) at c · rows + r.
template <typename A>
struct Matrix {
  const A* data = nullptr;
  int64_t rows = 0, columns = 0;
  bool by_column = false;

  Matrix transposed() const { return {data, columns, rows, !by_column}; }
  int64_t row_step() const { return by_column ? 1 : columns; }
  int64_t column_step() const { return by_column ? rows : 1; }
  Tensor tensor() const { return borrow(data, {rows, columns}, {row_step(), column_step()}); }
};

// Has the library work with one thread for as long as this stands, on the thread where it stands.
// Inside a parallel region oneDNN plans for all threads and then runs one: some of its kernels
// (gradients of convolutions) leave the others' share undone. Asked of the OpenMP that torch itself
// is linked to: there may be two in a process.
class OneThread {
 public:
  OneThread() {
    // At its first use on a thread torch sets the number of threads: that comes before.
    torch::stable::parallel_for(0, 1, 1, [](int64_t, int64_t) {});
    if (possible()) before_ = get()(), set()(1);
  }
  ~OneThread() {
    if (before_ > 0) set()(before_);
  }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

  // Whether it can be had; else the library has to be called outside any region.
  static bool possible() { return get() != nullptr && set() != nullptr; }

 private:
  static void* find(const char* name) {
    Dl_info info;
    if (dladdr(reinterpret_cast<void*>(&aoti_torch_dtype_float32), &info) == 0) return nullptr;
    void* const torch = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    return torch == nullptr ? nullptr : dlsym(torch, name);
  }
  using Get = int (*)();
  using Set = void (*)(int);
  static Get get() {
    static const Get function = reinterpret_cast<Get>(find("omp_get_max_threads"));
    return function;
  }
  static Set set() {
    static const Set function = reinterpret_cast<Set>(find("omp_set_num_threads"));
    return function;
  }

  int before_ = 0;
};

// Whether torch was built with oneDNN.
inline bool has_onednn() {
  static const bool has = [] {
    const float one[1] = {1};
    const Tensor x = borrow(one, {1, 1}, {1, 1});
    using torch::stable::detail::from;
    std::array<StableIValue, 5> stack{from(x), from(x), from(x), from(std::optional<Tensor>()),
                                      from(std::string("add"))};
    if (torch_call_dispatcher("mkldnn::_linear_pointwise", "binary", stack.data(),
                              TORCH_ABI_VERSION) != AOTI_TORCH_SUCCESS)
      return false;
    torch::stable::detail::to<Tensor>(stack[0]);
    return true;
  }();
  return has;
}

// Multiplications up to which a loop is done before the library has begun.
constexpr int64_t kSmall = 4096;

// to += x·wᵀ, element (r, c) of each at r · row + c · column.
#define LWKD_MULTIPLY(A)                                                                        \
  [[maybe_unused]] LWKD_CLONES static void multiply(                                            \
      const A* x, int64_t x_row, int64_t x_column, const A* w, int64_t w_row, int64_t w_column, \
      int64_t rows, int64_t columns, int64_t inner, A* to) {                                    \
    for (int64_t i = 0; i < rows; ++i)                                                          \
      for (int64_t j = 0; j < columns; ++j) {                                                   \
        double sum = 0;                                                                         \
        for (int64_t k = 0; k < inner; ++k)                                                     \
          sum += double(x[i * x_row + k * x_column]) * double(w[j * w_row + k * w_column]);     \
        to[i * columns + j] += static_cast<A>(sum);                                             \
      }                                                                                         \
  }
LWKD_MULTIPLY(float)
LWKD_MULTIPLY(double)

// Σ x·wᵀ over the pairs that are added, one after the other, none with more columns than the first.
template <typename A>
class Product {
 public:
  Product(int64_t rows, int64_t columns) : rows_(rows), columns_(columns) {}

  // `zeros`: rows · columns of them.
  void add(const Matrix<A>& x, const Matrix<A>& w, const A* zeros) {
    using torch::stable::detail::from;
    if (!sum_ && rows_ * columns_ * x.columns <= kSmall) {
      small_.resize(rows_ * columns_, A(0));
      multiply(x.data, x.row_step(), x.column_step(), w.data, w.row_step(), w.column_step(), rows_,
               columns_, x.columns, small_.data());
      return;
    }
    constexpr int64_t kLarge = 1 << 20;  // multiplications: fewer, and starting oneDNN takes longer
    if constexpr (std::is_same_v<A, float>) {
      // Where torch's BLAS is MKL, oneDNN is twice as fast as that on processors not of Intel's.
      if (rows_ * columns_ * x.columns >= kLarge && has_onednn()) {
        const Tensor other = sum_ ? *sum_ : borrow(zeros, {rows_, columns_}, {columns_, 1});
        std::array<StableIValue, 5> stack{from(x.tensor()), from(other), from(w.tensor()),
                                          from(std::optional<Tensor>()), from(std::string("add"))};
        TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("mkldnn::_linear_pointwise", "binary",
                                                     stack.data(), TORCH_ABI_VERSION));
        sum_ = torch::stable::detail::to<Tensor>(stack[0]);
        return;
      }
    }
    std::array<StableIValue, 2> stack{from(x.tensor()), from(w.transposed().tensor())};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "", stack.data(), TORCH_ABI_VERSION));
    Tensor product = torch::stable::detail::to<Tensor>(stack[0]);
    if (sum_) {
      A* to = static_cast<A*>(product.mutable_data_ptr());
      const A* more = data();
      for (int64_t i = 0; i < rows_ * columns_; ++i) to[i] += more[i];
    }
    sum_ = product;
  }

  const A* data() const {
    return sum_ ? static_cast<const A*>(sum_->const_data_ptr()) : small_.data();
  }

 private:
  int64_t rows_, columns_;
  std::vector<A> small_;
  std::optional<Tensor> sum_;
};

// How a convolution goes over its input.
struct Convolution {
  int64_t groups = 1;
  std::vector<int64_t> kernel, stride, padding, dilation;

  int64_t taps() const {
    int64_t count = 1;
    for (const int64_t k : kernel) count *= k;
    return count;
  }
};

// A sample's channels [C, *space], side by side.
template <typename A>
struct Image {
  const A* data = nullptr;
  int64_t channels = 0;
  std::vector<int64_t> size;

  int64_t positions() const {
    int64_t count = 1;
    for (const int64_t s : size) count *= s;
    return count;
  }
  Tensor tensor() const {
    std::vector<int64_t> sizes{1, channels};
    sizes.insert(sizes.end(), size.begin(), size.end());
    std::vector<int64_t> strides(sizes.size());
    int64_t step = 1;
    for (size_t k = sizes.size(); k-- > 0; step *= sizes[k]) strides[k] = step;
    return borrow(data, sizes, strides);
  }
};

// One sample's gradient by a convolution's weight, [channels of d, channels of x / groups, taps].
template <typename A>
Tensor weight_gradient(const Image<A>& x, const Image<A>& d, const Convolution& conv,
                       int64_t groups) {
  using torch::stable::detail::from;
  std::vector<int64_t> sizes{d.channels, x.channels / groups};
  sizes.insert(sizes.end(), conv.kernel.begin(), conv.kernel.end());
  // Of the weight only the shape is read: one number serves for all.
  const Tensor weight = borrow(x.data, sizes, std::vector<int64_t>(sizes.size(), 0));
  const std::vector<int64_t> none(conv.kernel.size(), 0);
  const bool wanted[3] = {false, true, false};
  std::array<StableIValue, 11> stack{from(d.tensor()),
                                     from(x.tensor()),
                                     from(weight),
                                     from(std::nullopt),
                                     from(conv.stride),
                                     from(conv.padding),
                                     from(conv.dilation),
                                     from(false),
                                     from(none),
                                     from(groups),
                                     from(torch::headeronly::HeaderOnlyArrayRef<bool>(wanted, 3))};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // nothing, as was asked for
  torch::stable::detail::to<Tensor>(stack[2]);
  return torch::stable::detail::to<Tensor>(stack[1]);
}

}  // namespace lwkd
