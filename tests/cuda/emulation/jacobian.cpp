// Runs the CUDA kernels of Jacobian rows on the tensors' own memory, through the emulator.
#include "host.h"
#include "jacobian_plan.cuh"
#include "reader.h"

namespace {

using namespace lwkd::cuda;

// A tensor is its address, dtype, stride of the batch, and row strides.
RowTensor row_tensor(Reader& r) {
  RowTensor t{r.pointer(), static_cast<int32_t>(r.next()), r.next(), {}};
  t.stride = r.list();
  return t;
}

template <typename A>
void run(HostLauncher& gpu, const int64_t* head, Reader& r) {
  const int64_t count = head[2], samples = head[3];
  const int32_t way = static_cast<int32_t>(head[4]);
  const bool mean = head[5] != 0;
  if (head[0] == 0) {
    double* sums = static_cast<double*>(r.pointer());
    A* out = static_cast<A*>(r.pointer());
    std::vector<RowPair> pairs(count);
    for (RowPair& pair : pairs) {
      pair.s = row_tensor(r), pair.t = row_tensor(r);
      pair.s_size = r.list(), pair.t_size = r.list();
    }
    return rows_forward<A>(gpu, pairs, samples, way, mean, sums, out);
  }
  std::vector<RowGradient> jobs(count);
  for (RowGradient& job : jobs) {
    job.x = row_tensor(r), job.dx = row_tensor(r), job.y = row_tensor(r);
    job.size = r.list();
    job.sums = static_cast<const double*>(r.pointer());
    job.grad = r.pointer();
    job.grad_stride = r.next();
    job.side = static_cast<int32_t>(r.next());
  }
  rows_backward(gpu, jobs, samples, way, mean, head[6] != 0);
}

}  // namespace

// head: op (0 forward, 1 backward), computes in double, tensors, samples, way, mean, grad in
// double, seed.
extern "C" __attribute__((visibility("default"))) void emulate_rows(const int64_t* head,
                                                                    const int64_t* ints) {
  HostLauncher gpu(static_cast<unsigned>(head[7]));
  Reader reader(ints);
  head[1] != 0 ? run<double>(gpu, head, reader) : run<float>(gpu, head, reader);
}
