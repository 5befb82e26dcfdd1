// The attention kind on CUDA: reads tensors and layouts, lets attention_plan.cuh launch.
#include <tuple>
#include <vector>

#include "../operand.h"
#include "attention_plan.cuh"
#include "launch.cuh"

namespace lwkd::cuda {
namespace {

View view_of(const Operand& o) {
  View v{o.data, dtype_of(o.dtype), o.n, o.c, {}, o.stride_n, o.stride_c, {}};
  std::copy_n(o.size, 3, v.size);
  std::copy_n(o.stride, 3, v.stride);
  return v;
}

// The tokens that were dropped before `o`, as positions of one run.
View prefix_of(const Operand& o) {
  View v = view_of(o);
  if (o.prefix == 0) return v.c = 0, v;
  v.data = static_cast<char*>(o.data) - o.prefix * o.stride_token * v.element();
  v.size[0] = v.size[1] = 1;
  v.size[2] = o.prefix;
  v.stride[2] = o.stride_token;
  return v;
}

Mask mask_of(const std::vector<Tensor>& mask, size_t layer) {
  Mask m{};
  if (mask.empty() || mask[layer].dim() < 2) return m;  // one dimension stands for none
  const Tensor& t = mask[layer];
  m.data = static_cast<const uint8_t*>(t.const_data_ptr());
  m.stride_n = t.stride(0);
  for (int64_t d = t.dim() - 1, at = 2; d > 0; --d, --at) m.stride[at] = t.stride(d);
  return m;
}

// Calls run(float{}) or run(double{}).
template <typename Run>
void with_compute(bool wide, const Run& run) {
  if (wide)
    run(double{});
  else
    run(float{});
}

std::tuple<Tensor, Tensor> attention(std::vector<Tensor> student, std::vector<Tensor> teacher,
                                     std::vector<Tensor> mask, std::vector<int64_t> student_layout,
                                     std::vector<int64_t> teacher_layout, double p,
                                     int64_t divergence, double beta, bool mean) {
  const auto layers = read_layers(student, teacher, student_layout, teacher_layout);
  const int64_t samples = student[0].size(0), length = layers.size();
  const bool wide = any_double(student) || any_double(teacher);
  std::vector<LayerViews> views(length);
  int64_t cells = 0;
  for (int64_t l = 0; l < length; ++l) {
    LayerViews& v = views[l];
    for (int side = 0; side < 2; ++side) v.side[side] = view_of(layers[l].side[side]);
    std::copy_n(layers[l].space, 3, v.space);
    check_mask(mask, l, samples, v.space);
    v.mask = mask_of(mask, l);
    cells += v.cells();
  }
  Launcher gpu(student[0]);
  Tensor distance =
      mean ? make(student[0], {length}, wide) : make(student[0], {length, samples}, wide);
  Tensor maps = make(student[0], {2 * samples * cells}, wide);
  with_compute(wide, [&](auto tag) {
    using A = decltype(tag);
    forward<A>(gpu, views, static_cast<A*>(maps.mutable_data_ptr()),
               static_cast<A*>(distance.mutable_data_ptr()), {p, divergence == 1, beta, mean});
  });
  return {distance, maps};
}

std::vector<Tensor> attention_maps(std::vector<Tensor> xs, std::vector<int64_t> channel_dims,
                                   double p) {
  STD_TORCH_CHECK(xs.size() == channel_dims.size(),
                  "lwkd.ops: attention_maps: channel_dims: ", "expected one a tensor, got ",
                  channel_dims.size());
  std::vector<Tensor> out;
  std::vector<View> views[2];
  std::vector<void*> maps[2];
  for (size_t i = 0; i < xs.size(); ++i) {
    const int64_t layout[4] = {channel_dims[i], 0, 0, 0};
    std::vector<int64_t> size;
    for (int64_t d = 0; d < xs[i].dim(); ++d)
      if (d != channel_dims[i]) size.push_back(xs[i].size(d));
    const bool wide = xs[i].scalar_type() == ScalarType::Double;
    out.push_back(make(xs[i], size, wide));
    views[wide].push_back(view_of(read_operand(xs[i], layout, "xs", i)));
    maps[wide].push_back(out.back().mutable_data_ptr());
  }
  Launcher gpu(xs[0]);
  maps_alone<float>(gpu, views[0], maps[0], p);
  maps_alone<double>(gpu, views[1], maps[1], p);
  return out;
}

std::vector<Tensor> attention_backward(Tensor grad, std::vector<Tensor> xs,
                                       std::vector<Tensor> mask, Tensor maps,
                                       std::vector<int64_t> layers, std::vector<int64_t> sides,
                                       std::vector<int64_t> layout, std::vector<int64_t> space,
                                       double p, int64_t divergence, double beta) {
  const auto operands = read_gradient_lists(grad, xs, mask, maps, layers, sides, layout, space);
  const int64_t length = space.size() / 3, samples = xs[0].size(0);
  const bool wide = maps.scalar_type() == ScalarType::Double, mean = grad.dim() == 1;
  const int64_t element = wide ? 8 : 4;
  std::vector<int64_t> offsets(length);
  for (int64_t l = 0, offset = 0; l < length; ++l) {
    offsets[l] = offset;
    offset += 2 * samples * space[3 * l] * space[3 * l + 1] * space[3 * l + 2];
  }
  std::vector<Tensor> out;
  std::vector<GradientViews> jobs(xs.size());
  for (size_t i = 0; i < xs.size(); ++i) {
    const int64_t l = layers[i], side = sides[i];
    out.push_back(fresh_like(xs[i]));
    const Operand dx = read_operand(out[i], &layout[4 * i], "gradient", i);
    GradientViews& job = jobs[i];
    job.x = view_of(operands[i]);
    job.dx = view_of(dx);
    job.prefix = prefix_of(dx);
    std::copy_n(&space[3 * l], 3, job.space);
    const char* pair = static_cast<const char*>(maps.const_data_ptr()) + offsets[l] * element;
    const int64_t map = samples * job.cells() * element;
    job.own = pair + side * map;
    job.other = pair + (1 - side) * map;
    job.mask = mask_of(mask, l);
    job.grad = static_cast<const char*>(grad.const_data_ptr()) + l * grad.stride(0) * element;
    job.grad_stride = mean ? 0 : grad.stride(1);
    job.weight = side == 0 ? beta : 1 - beta;
  }
  Launcher gpu(xs[0]);
  const Options options{p, divergence == 1, beta, mean};
  with_compute(wide, [&](auto tag) { backward<decltype(tag)>(gpu, jobs, options); });
  return out;
}

}  // namespace
}  // namespace lwkd::cuda

STABLE_TORCH_LIBRARY_IMPL(lwkd, CUDA, m) {
  m.impl("attention", LWKD_BOX(lwkd::cuda::attention));
  m.impl("attention_backward", LWKD_BOX(lwkd::cuda::attention_backward));
  m.impl("attention_maps", LWKD_BOX(lwkd::cuda::attention_maps));
}
