// The Hessian kind on CUDA: reads tensors, lets hessian_plan.cuh launch.
#include <vector>

#include "../operand.h"
#include "hessian_plan.cuh"
#include "launch.cuh"

namespace lwkd::cuda {
namespace {

// A tensor, or (probe ≥ 0) one probe's part of it.
Elements elements_of(const Tensor& x, const char* op, const char* argument, int64_t layer,
                     int64_t probe = -1) {
  ProbeTensor t{const_cast<void*>(x.const_data_ptr()), dtype_of(x.scalar_type()), {}, {}};
  if (probe >= 0)
    t.data = static_cast<char*>(t.data) + probe * x.stride(0) * element_size(x.scalar_type());
  for (int64_t d = probe >= 0 ? 1 : 0; d < x.dim(); ++d) {
    t.size.push_back(x.size(d));
    t.stride.push_back(x.stride(d));
  }
  Elements elements;
  STD_TORCH_CHECK(read_elements(t, elements), "lwkd.ops: ", op, ": ", argument, " (layer ", layer,
                  "): expected at most ", kElementDims, " dimensions with gaps between them; pass ",
                  "a contiguous tensor");
  return elements;
}

Probe probe_of(int64_t seed, int64_t layer, int64_t probe) {
  return {static_cast<uint64_t>(seed), static_cast<uint32_t>(layer), static_cast<uint32_t>(probe)};
}

Tensor rademacher(Tensor like, int64_t seed, int64_t layer, int64_t probe) {
  const Tensor out = fresh_like(like);
  Launcher gpu(out);
  write_signs(gpu, {elements_of(out, "rademacher", "like", layer), probe_of(seed, layer, probe)});
  return out;
}

Tensor probe_dot(std::vector<Tensor> hvps, std::vector<int64_t> layers, int64_t seed, int64_t probe,
                 int64_t probes) {
  const int64_t count = hvps.size();
  STD_TORCH_CHECK(count > 0 && layers.size() == hvps.size(),
                  "lwkd.ops: probe_dot: hvps: expected at least one, with a layer each, got ",
                  count);
  std::vector<ProbeJob> jobs;
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(probes == 0 || (hvps[i].dim() > 0 && hvps[i].size(0) == probes),
                    "lwkd.ops: probe_dot: hvps (layer ", i, "): expected ", probes,
                    " probes, got others");
    for (int64_t k = 0; k < std::max<int64_t>(probes, 1); ++k)
      jobs.push_back({elements_of(hvps[i], "probe_dot", "hvps", i, probes == 0 ? -1 : k),
                      probe_of(seed, layers[i], probe + k)});
  }
  std::vector<int64_t> shape{count};
  if (probes > 0) shape.push_back(probes);
  Launcher gpu(hvps[0]);
  const bool wide = any_double(hvps);
  const Tensor out = make(hvps[0], shape, wide);
  void* data = out.mutable_data_ptr();
  wide ? dot_probes(gpu, jobs, static_cast<double*>(data))
       : dot_probes(gpu, jobs, static_cast<float*>(data));
  return out;
}

}  // namespace
}  // namespace lwkd::cuda

STABLE_TORCH_LIBRARY_IMPL(lwkd, CUDA, m) {
  m.impl("rademacher", LWKD_BOX(lwkd::cuda::rademacher));
  m.impl("probe_dot", LWKD_BOX(lwkd::cuda::probe_dot));
}
