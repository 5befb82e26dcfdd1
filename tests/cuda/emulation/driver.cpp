// Runs the CUDA kernels of the attention kind on raw buffers, through the emulator: a library whose
// one function is called with pointers, and a program that reads a file of such calls, with every
// buffer in an allocation of exactly its size for the sanitizers.
#include <fstream>
#include <string>

#include "attention_plan.cuh"
#include "host.h"

namespace {

using namespace lwkd::cuda;

// A call is a list of integers, read in order; a pointer is a buffer's index and a byte offset.
class Reader {
 public:
  Reader(const int64_t* ints, void* const* buffers) : at_(ints), buffers_(buffers) {}

  int64_t next() { return *at_++; }
  void* pointer() {
    const int64_t index = next(), offset = next();
    return index < 0 ? nullptr : static_cast<char*>(buffers_[index]) + offset;
  }
  View view() {
    View v{};
    v.data = pointer();
    v.dtype = static_cast<int32_t>(next());
    v.n = next(), v.c = next();
    for (auto& s : v.size) s = next();
    v.stride_n = next(), v.stride_c = next();
    for (auto& s : v.stride) s = next();
    return v;
  }
  Mask mask() {
    Mask m{};
    m.data = static_cast<const uint8_t*>(pointer());
    m.stride_n = next();
    for (auto& s : m.stride) s = next();
    return m;
  }

 private:
  const int64_t* at_;
  void* const* buffers_;
};

template <typename A>
void run(HostLauncher& gpu, int64_t op, Reader& r, const Options& options) {
  const int64_t length = r.next();
  if (op == 0) {
    A* maps = static_cast<A*>(r.pointer());
    A* out = static_cast<A*>(r.pointer());
    std::vector<LayerViews> layers(length);
    for (auto& layer : layers) {
      for (auto& side : layer.side) side = r.view();
      for (auto& s : layer.space) s = r.next();
      layer.mask = r.mask();
    }
    forward<A>(gpu, layers, maps, out, options);
  } else if (op == 1) {
    std::vector<GradientViews> jobs(length);
    for (auto& job : jobs) {
      job.x = r.view(), job.dx = r.view(), job.prefix = r.view();
      job.own = r.pointer(), job.other = r.pointer();
      for (auto& s : job.space) s = r.next();
      job.mask = r.mask();
      job.grad = r.pointer();
      job.grad_stride = r.next();
      job.weight = r.next() == 0 ? options.beta : 1 - options.beta;
    }
    backward<A>(gpu, jobs, options);
  } else {
    std::vector<View> views(length);
    std::vector<void*> out(length);
    for (int64_t i = 0; i < length; ++i) views[i] = r.view(), out[i] = r.pointer();
    maps_alone<A>(gpu, views, out, options.p);
  }
}

}  // namespace

// head: op (0 forward, 1 backward, 2 maps), computes in double, js, mean, seed.
extern "C" __attribute__((visibility("default"))) void emulate(const int64_t* head,
                                                               const double* reals,
                                                               const int64_t* ints,
                                                               void* const* buffers) {
  HostLauncher gpu(static_cast<unsigned>(head[4]));
  const Options options{reals[0], head[2] != 0, reals[1], head[3] != 0};
  Reader reader(ints, buffers);
  if (head[1] != 0)
    run<double>(gpu, head[0], reader, options);
  else
    run<float>(gpu, head[0], reader, options);
}

// Reads calls from argv[1] and writes their buffers to argv[2]. A call: head, reals, the count of
// integers and the integers, the count of buffers, and each with its length in bytes.
int main(int argc, char** argv) {
  if (argc != 3) return 2;
  std::ifstream in(argv[1], std::ios::binary);
  std::ofstream out(argv[2], std::ios::binary);
  const auto read = [&](void* data, size_t bytes) {
    return bool(in.read(static_cast<char*>(data), static_cast<std::streamsize>(bytes)));
  };
  int64_t head[5], count;
  double reals[2];
  while (read(head, sizeof(head)) && read(reals, sizeof(reals)) && read(&count, 8)) {
    std::vector<int64_t> ints(count);
    read(ints.data(), 8 * count);
    read(&count, 8);
    std::vector<void*> buffers(count);
    std::vector<int64_t> bytes(count);
    for (int64_t i = 0; i < count; ++i) {
      read(&bytes[i], 8);
      buffers[i] = std::malloc(bytes[i]);  // 16-byte aligned
      read(buffers[i], bytes[i]);
    }
    emulate(head, reals, ints.data(), buffers.data());
    for (int64_t i = 0; i < count; ++i) {
      out.write(static_cast<char*>(buffers[i]), bytes[i]);
      std::free(buffers[i]);
    }
  }
  return in.eof() ? 0 : 1;
}
