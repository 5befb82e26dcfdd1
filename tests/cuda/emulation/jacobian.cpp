// Runs the CUDA kernels of Jacobian rows on the tensors' own memory, through the emulator.
#include "host.h"
#include "jacobian_plan.cuh"

namespace {

using namespace lwkd::cuda;

// Integers read in order: a tensor is its address, dtype, stride of the batch, and row strides.
class Reader {
 public:
  explicit Reader(const int64_t* ints) : at_(ints) {}

  int64_t next() { return *at_++; }
  void* pointer() { return reinterpret_cast<void*>(next()); }
  std::vector<int64_t> list() {
    std::vector<int64_t> out(next());
    for (int64_t& x : out) x = next();
    return out;
  }
  RowTensor tensor() {
    RowTensor t{pointer(), static_cast<int32_t>(next()), next(), {}};
    t.stride = list();
    return t;
  }

 private:
  const int64_t* at_;
};

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
      pair.s = r.tensor(), pair.t = r.tensor();
      pair.s_size = r.list(), pair.t_size = r.list();
    }
    return rows_forward<A>(gpu, pairs, samples, way, mean, sums, out);
  }
  std::vector<RowGradient> jobs(count);
  for (RowGradient& job : jobs) {
    job.x = r.tensor(), job.dx = r.tensor(), job.y = r.tensor();
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
