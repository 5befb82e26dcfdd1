// Jacobian factors on CUDA: reads tensors, lets factors_plan.cuh launch, and has torch multiply.
#include <array>

#include "../factor_arguments.h"
#include "factors_plan.cuh"
#include "launch.cuh"

namespace lwkd::cuda {
namespace {

class Multiplier : public Launcher {
 public:
  explicit Multiplier(const Tensor& like) : Launcher(like), device_(like.get_device_index()) {}

  // torch's own products, float32 as torch.set_float32_matmul_precision has it.
  template <typename A>
  void multiply(int64_t batch, int64_t rows, int64_t inner, int64_t columns, const Strided<A>& x,
                const Strided<A>& y, A* out) const {
    using torch::stable::detail::from;
    const Tensor to = borrow(out, {batch, rows, columns}, {rows * columns, columns, 1});
    std::array<StableIValue, 3> stack{
        from(borrow(x.data, {batch, rows, inner}, {rows * inner, x.row, x.column})),
        from(borrow(y.data, {batch, inner, columns}, {inner * columns, y.row, y.column})),
        from(to)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::bmm", "out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);
  }

 private:
  template <typename A>
  Tensor borrow(const A* data, const std::array<int64_t, 3>& size,
                const std::array<int64_t, 3>& stride) const {
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
        const_cast<A*>(data), 3, size.data(), stride.data(), 0,
        std::is_same_v<A, double> ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(),
        aoti_torch_device_type_cuda(), device_, &handle));
    return Tensor(handle);
  }

  int32_t device_;
};

FactorTensor factor_tensor(const Tensor& x) {
  const bool indices = x.scalar_type() == ScalarType::Long;
  FactorTensor t{x.const_data_ptr(), indices ? 0 : dtype_of(x.scalar_type()), {}, {}};
  for (int64_t d = 0; d < x.dim(); ++d) {
    t.size.push_back(x.size(d));
    t.stride.push_back(x.stride(d));
  }
  return t;
}

// An output of a transposed convolution may be longer than the kernel reaches; nothing reads there.
std::vector<FactorItem> read_items(const FactorLists& in) {
  std::vector<FactorItem> items;
  const auto add = [&](size_t i, const std::vector<int>& sides) {
    std::vector<FactorTensor> a, d;
    for (const int side : sides) {
      a.push_back(factor_tensor(in.a[side][i]));
      d.push_back(factor_tensor(in.d[side][i]));
    }
    items.push_back(read_factor(a, d, in.form(i, sides[0]), in.contractions[i] == 0));
    items.back().layer = in.layers[i];
    items.back().side = sides.size() == 1 ? sides[0] : 0;
  };
  for (size_t i = 0; i < in.layers.size(); ++i) {
    if (in.squares)
      add(i, {0});
    else if (in.how == lwkd::kNorms)
      add(i, {0}), add(i, {1});
    else
      add(i, {0, 1});
  }
  return items;
}

Tensor jacobian_factors(std::vector<Tensor> student_a, std::vector<Tensor> student_d,
                        std::vector<Tensor> teacher_a, std::vector<Tensor> teacher_d,
                        std::vector<int64_t> layers, std::vector<int64_t> forms,
                        std::vector<int64_t> contractions, int64_t how_number, bool mean) {
  FactorLists in{{student_a, teacher_a}, {student_d, teacher_d}, layers, forms, contractions};
  in.check(how_number);
  const std::vector<FactorItem> items = read_items(in);
  Multiplier gpu(student_d[0]);
  std::vector<int64_t> shape{in.length()};
  if (!mean) shape.push_back(in.samples);
  const Tensor out = make(student_d[0], shape, in.wide());
  const auto run = [&](auto* to) {
    using A = std::remove_pointer_t<decltype(to)>;
    const int32_t way = in.squares ? kSquareNorms : static_cast<int32_t>(in.how);
    FactorCall<A, Multiplier>(gpu, items, in.length(), in.samples, way).run(mean, to);
  };
  void* data = out.mutable_data_ptr();
  in.wide() ? run(static_cast<double*>(data)) : run(static_cast<float*>(data));
  return out;
}

}  // namespace
}  // namespace lwkd::cuda

STABLE_TORCH_LIBRARY_IMPL(lwkd, CUDA, m) {
  m.impl("jacobian_factors", LWKD_BOX(lwkd::cuda::jacobian_factors));
}
