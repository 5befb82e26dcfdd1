// Runs the CUDA kernels of the Hessian kind on the tensors' own memory, through the emulator.
#include "hessian_plan.cuh"
#include "host.h"
#include "reader.h"

namespace {

using namespace lwkd::cuda;

ProbeJob job_of(Reader& r) {
  ProbeTensor t{r.pointer(), static_cast<int32_t>(r.next()), r.list(), {}};
  t.stride = r.list();
  ProbeJob job{};
  if (!read_elements(t, job.x)) std::abort();
  job.signs.seed = static_cast<uint64_t>(r.next());
  job.signs.layer = static_cast<uint32_t>(r.next());
  job.signs.probe = static_cast<uint32_t>(r.next());
  return job;
}

}  // namespace

// head: op (0 signs, 1 products), jobs, computes in double, the emulator's seed.
extern "C" __attribute__((visibility("default"))) void emulate_hessian(const int64_t* head,
                                                                       const int64_t* ints) {
  HostLauncher gpu(static_cast<unsigned>(head[3]));
  Reader reader(ints);
  if (head[0] == 0) return write_signs(gpu, job_of(reader));
  void* out = reader.pointer();
  std::vector<ProbeJob> jobs;
  for (int64_t i = 0; i < head[1]; ++i) jobs.push_back(job_of(reader));
  head[2] != 0 ? dot_probes(gpu, jobs, static_cast<double*>(out))
               : dot_probes(gpu, jobs, static_cast<float*>(out));
}
