// How calls of the Hessian kind become launches, and where their scratch goes. No torch here:
// tests/cuda/emulation runs it, with a launcher as attention_plan.cuh describes.
#pragma once

#include "hessian_kernels.cuh"

namespace lwkd::cuda {

// A tensor; strides in elements, outermost first.
struct ProbeTensor {
  void* data;
  int32_t dtype;
  std::vector<int64_t> size, stride;
};

// Its elements in logical order, neighbouring dimensions merged where memory allows; false where
// more are left than a kernel knows.
inline bool read_elements(const ProbeTensor& t, Elements& x) {
  x = {t.data, t.dtype, false, 1, {}, {}};
  int known = 0;
  for (size_t d = t.size.size(); d-- > 0;) {
    x.length *= t.size[d];
    if (t.size[d] == 1) continue;
    if (known > 0 && t.stride[d] == x.size[known - 1] * x.stride[known - 1]) {
      x.size[known - 1] *= t.size[d];
      continue;
    }
    if (known == kElementDims) return false;
    x.size[known] = t.size[d], x.stride[known] = t.stride[d];
    ++known;
  }
  x.dense = known == 0 || (known == 1 && x.stride[0] == 1);
  x.size[known == 0 ? 0 : known - 1] = INT64_MAX;
  return true;
}

struct ProbeJob {
  Elements x;
  Probe signs;
};

template <typename Launcher>
void write_signs(Launcher& gpu, const ProbeJob& job) {
  if (job.x.length == 0) return;
  const std::vector<ProbeItem> items{{0, job.x, job.signs, nullptr}};
  const int64_t blocks = ceil_div(job.x.length, kBlockElements);
  with_tables<true>(items, [&](auto& table, size_t) {
    const int64_t count = number_blocks(table, &blocks);
    gpu.launch(signs_kernel<sizeof(table.item) / sizeof(ProbeItem)>, count, kThreads, kWordBytes,
               table);
  });
}

// out: a number a job.
template <typename A, typename Launcher>
void dot_probes(Launcher& gpu, const std::vector<ProbeJob>& jobs, A* out) {
  Scratch scratch;
  std::vector<ProbeItem> items;
  std::vector<TotalItem> totals;
  std::vector<int64_t> blocks, offsets;
  for (const ProbeJob& job : jobs) {
    blocks.push_back(ceil_div(job.x.length, kBlockElements));
    offsets.push_back(scratch.reserve(blocks.back(), sizeof(double)));
  }
  scratch.data = static_cast<char*>(gpu.allocate(scratch.bytes));
  for (size_t i = 0; i < jobs.size(); ++i) {
    double* partial = scratch.at<double>(offsets[i]);
    totals.push_back({0, partial, blocks[i], out + i});
    if (blocks[i] > 0) items.push_back({0, jobs[i].x, jobs[i].signs, partial});
  }
  std::erase(blocks, 0);
  with_tables<true>(items, [&](auto& table, size_t from) {
    const int64_t count = number_blocks(table, blocks.data() + from);
    gpu.launch(dot_kernel<sizeof(table.item) / sizeof(ProbeItem)>, count, kThreads, kWordBytes,
               table);
  });
  const std::vector<int64_t> one(totals.size(), 1);
  with_tables<true>(totals, [&](auto& table, size_t from) {
    const int64_t count = number_blocks(table, one.data() + from);
    gpu.launch(total_kernel<A, sizeof(table.item) / sizeof(TotalItem)>, count, kThreads,
               kWarps * sizeof(double), table);
  });
}

}  // namespace lwkd::cuda
