// Jacobian rows on CUDA: reads tensors, lets jacobian_plan.cuh launch.
#include <tuple>
#include <vector>

#include "../jacobian.h"
#include "../operand.h"
#include "jacobian_plan.cuh"
#include "launch.cuh"

namespace lwkd::cuda {
namespace {

RowTensor row_tensor(const Tensor& x) {
  RowTensor t{const_cast<void*>(x.const_data_ptr()), dtype_of(x.scalar_type()), x.stride(0), {}};
  for (int64_t d = 1; d < x.dim(); ++d) t.stride.push_back(x.stride(d));
  return t;
}

std::vector<int64_t> row_size(const Tensor& x) {
  std::vector<int64_t> size;
  for (int64_t d = 1; d < x.dim(); ++d) size.push_back(x.size(d));
  return size;
}

std::tuple<Tensor, Tensor> jacobian_rows(std::vector<Tensor> student, std::vector<Tensor> teacher,
                                         int64_t how_number, bool mean) {
  const How how = check_rows(student, teacher, how_number);
  const int64_t length = student.size(), samples = student[0].size(0);
  const bool wide = any_double(student) || any_double(teacher);
  std::vector<RowPair> pairs;
  for (int64_t l = 0; l < length; ++l)
    pairs.push_back({row_tensor(student[l]), row_tensor(teacher[l]), row_size(student[l]),
                     row_size(teacher[l])});
  Launcher gpu(student[0]);
  Tensor sums = make(student[0], {length, samples, 3}, true);
  Tensor out = mean ? make(student[0], {length}, wide) : make(student[0], {length, samples}, wide);
  const auto run = [&](auto* to) {
    using A = std::remove_pointer_t<decltype(to)>;
    rows_forward<A>(gpu, pairs, samples, how, mean, static_cast<double*>(sums.mutable_data_ptr()),
                    to);
  };
  void* data = out.mutable_data_ptr();
  wide ? run(static_cast<double*>(data)) : run(static_cast<float*>(data));
  return {out, sums};
}

std::vector<Tensor> jacobian_rows_backward(Tensor grad, std::vector<Tensor> xs,
                                           std::vector<Tensor> others, Tensor sums,
                                           std::vector<int64_t> layers, std::vector<int64_t> sides,
                                           int64_t how_number) {
  const How how = check_rows_backward(grad, xs, others, sums, layers, sides, how_number);
  const int64_t samples = sums.size(1);
  const bool wide_grad = grad.scalar_type() == ScalarType::Double, mean = grad.dim() == 1;
  std::vector<Tensor> out;
  std::vector<RowGradient> jobs;
  for (size_t i = 0; i < xs.size(); ++i) {
    out.push_back(fresh_like(xs[i]));
    RowGradient job{};
    job.x = row_tensor(xs[i]);
    job.dx = row_tensor(out[i]);
    if (how != lwkd::kNorms) job.y = row_tensor(others[i]);
    job.size = row_size(xs[i]);
    job.sums = static_cast<const double*>(sums.const_data_ptr()) + layers[i] * samples * 3;
    job.grad = static_cast<const char*>(grad.const_data_ptr()) +
               layers[i] * grad.stride(0) * element_size(grad.scalar_type());
    job.grad_stride = mean ? 0 : grad.stride(1);
    job.side = static_cast<int32_t>(sides[i]);
    jobs.push_back(job);
  }
  Launcher gpu(xs[0]);
  rows_backward(gpu, jobs, samples, how, mean, wide_grad);
  return out;
}

}  // namespace
}  // namespace lwkd::cuda

STABLE_TORCH_LIBRARY_IMPL(lwkd, CUDA, m) {
  m.impl("jacobian_rows", LWKD_BOX(lwkd::cuda::jacobian_rows));
  m.impl("jacobian_rows_backward", LWKD_BOX(lwkd::cuda::jacobian_rows_backward));
}
