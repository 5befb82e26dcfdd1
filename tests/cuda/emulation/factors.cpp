// Runs the CUDA kernels of Jacobian factors on the tensors' own memory, through the emulator; what
// the library multiplies on a GPU, plain loops multiply here.
#include "factors_plan.cuh"
#include "host.h"
#include "reader.h"

namespace {

using namespace lwkd::cuda;

class HostMultiplier : public HostLauncher {
 public:
  using HostLauncher::HostLauncher;

  template <typename A>
  void multiply(int64_t batch, int64_t rows, int64_t inner, int64_t columns, const Strided<A>& x,
                const Strided<A>& y, A* out) {
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) {
          double sum = 0;
          for (int64_t k = 0; k < inner; ++k)
            sum += double(x.data[b * rows * inner + i * x.row + k * x.column]) *
                   double(y.data[b * inner * columns + k * y.row + j * y.column]);
          out[(b * rows + i) * columns + j] = static_cast<A>(sum);
        }
  }
};

FactorTensor factor_tensor(Reader& r) {
  FactorTensor t{r.pointer(), static_cast<int32_t>(r.next()), r.list(), {}};
  t.stride = r.list();
  return t;
}

// head: items, layers, samples, way, mean, seed, computes in double. Of an item: layer, side, gram,
// form, and a, d of each of its networks.
template <typename A>
void run(const int64_t* head, Reader& r) {
  HostMultiplier gpu(static_cast<unsigned>(head[5]));
  A* out = static_cast<A*>(r.pointer());
  std::vector<FactorItem> items;
  for (int64_t i = 0; i < head[0]; ++i) {
    const int64_t layer = r.next(), side = r.next(), gram = r.next(), sides = r.next();
    const std::vector<int64_t> form = r.list();
    std::vector<FactorTensor> a, d;
    for (int64_t k = 0; k < sides; ++k) a.push_back(factor_tensor(r)), d.push_back(factor_tensor(r));
    items.push_back(read_factor(a, d, form.data(), gram != 0));
    items.back().layer = layer, items.back().side = static_cast<int>(side);
  }
  const int32_t way = static_cast<int32_t>(head[3]);
  FactorCall<A, HostMultiplier>(gpu, items, head[1], head[2], way).run(head[4] != 0, out);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void emulate_factors(const int64_t* head,
                                                                       const int64_t* ints) {
  Reader reader(ints);
  head[6] != 0 ? run<double>(head, reader) : run<float>(head, reader);
}
