// How a call on Jacobian rows becomes launches, and where its scratch goes. No torch here:
// tests/cuda/emulation runs it, with a launcher as attention_plan.cuh describes.
#pragma once

#include "jacobian_kernels.cuh"

namespace lwkd::cuda {

// One tensor [N, ...]; strides in elements, outermost first.
struct RowTensor {
  void* data;
  int32_t dtype;
  int64_t stride_n;
  std::vector<int64_t> stride;
};

struct RowPair {
  RowTensor s, t;
  std::vector<int64_t> s_size, t_size;  // of a row: kNorms alone lets them differ
};

struct RowGradient {
  RowTensor x, dx, y;  // y: data null where the other row does not count
  std::vector<int64_t> size;
  const double* sums;
  const void* grad;
  int64_t grad_stride;
  int32_t side;
};

inline int element_of(int32_t dtype) { return dtype == kDouble ? 8 : dtype == kFloat ? 4 : 2; }

// Whether so many dimensions remain that a kernel cannot hold them.
inline bool cut_rows(Rows& r, const std::vector<const RowTensor*>& tensors,
                     const std::vector<int64_t>& size, int64_t n) {
  r = {};
  r.n = n, r.length = 1;
  const size_t count = tensors.size();
  std::vector<size_t> order;
  for (size_t d = 0; d < size.size(); ++d) {
    r.length *= size[d];
    if (size[d] != 1) order.push_back(d);
  }
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return tensors[0]->stride[a] < tensors[0]->stride[b];
  });
  for (const size_t d : order) {  // innermost first
    bool merges = r.dims > 0;
    for (size_t k = 0; merges && k < count; ++k)
      merges = tensors[k]->stride[d] == r.size[r.dims - 1] * r.stride[k][r.dims - 1];
    if (merges) {
      r.size[r.dims - 1] *= size[d];
      continue;
    }
    if (r.dims == kDims) return false;
    r.size[r.dims] = size[d];
    for (size_t k = 0; k < count; ++k) r.stride[k][r.dims] = tensors[k]->stride[d];
    ++r.dims;
  }
  if (r.dims == 0) {
    r.dims = 1, r.size[0] = 1;
    for (size_t k = 0; k < count; ++k) r.stride[k][0] = 1;
  }
  r.pieces = std::max<int64_t>(1, (r.length + kPiece - 1) / kPiece);
  r.dense = r.packed = r.dims == 1;
  for (size_t k = 0; k < count; ++k) {
    const RowTensor& t = *tensors[k];
    r.data[k] = t.data, r.dtype[k] = t.dtype, r.stride_n[k] = t.stride_n;
    const int64_t pack = 16 / element_of(t.dtype);
    r.dense = r.dense && r.stride[k][0] == 1;
    r.packed = r.packed && r.dense && t.dtype == tensors[0]->dtype && r.length % pack == 0 &&
               (n == 1 || t.stride_n % pack == 0) && reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
  }
  return true;
}

inline int64_t blocks_of(const Rows& r) {
  const int64_t teams = r.length <= kShortRow ? kThreads / 32 : 1;
  return (r.n + teams - 1) / teams * r.pieces;
}

constexpr int64_t kSumsShared = kThreads / 32 * 3 * 8;

// Calls run(integral_constant of the way).
template <typename Run>
void with_way(int32_t way, const Run& run) {
  if (way == kDifference)
    run(std::integral_constant<int, kDifference>{});
  else if (way == kNormalized)
    run(std::integral_constant<int, kNormalized>{});
  else
    run(std::integral_constant<int, kNorms>{});
}

// sums [L, N, 3], out [L, N] or [L]. False where a tensor has too many dimensions.
template <typename A, typename Launcher>
bool rows_forward(Launcher& gpu, const std::vector<RowPair>& pairs, int64_t samples, int32_t way,
                  bool mean, double* sums, A* out) {
  std::vector<SumItem> items;
  std::vector<int64_t> blocks, offsets;
  Scratch scratch;
  const auto add = [&](const std::vector<const RowTensor*>& tensors,
                       const std::vector<int64_t>& size) {
    SumItem item{};
    if (!cut_rows(item.rows, tensors, size, samples)) return false;
    items.push_back(item);
    blocks.push_back(blocks_of(item.rows));
    offsets.push_back(scratch.reserve(samples * item.rows.pieces * 3, sizeof(double)));
    return true;
  };
  for (const RowPair& pair : pairs) {
    if (way == kNorms) {
      if (!add({&pair.s}, pair.s_size) || !add({&pair.t}, pair.t_size)) return false;
    } else if (!add({&pair.s, &pair.t}, pair.s_size)) {
      return false;
    }
  }
  scratch.data = static_cast<char*>(gpu.allocate(scratch.bytes));
  for (size_t i = 0; i < items.size(); ++i) items[i].out = scratch.at<double>(offsets[i]);
  if (samples > 0)
    with_tables<true>(items, [&](auto& table, size_t from) {
      const int64_t count = number_blocks(table, blocks.data() + from);
      with_way(way, [&](auto w) {
        gpu.launch(sums_kernel<A, w.value, sizeof(table.item) / sizeof(SumItem)>, count, kThreads,
                   kSumsShared, table);
      });
    });
  std::vector<FinishItem> ends;
  for (size_t l = 0; l < pairs.size(); ++l) {
    const size_t s = way == kNorms ? 2 * l : l, t = way == kNorms ? 2 * l + 1 : l;
    ends.push_back({0, items[s].out, items[t].out, items[s].rows.pieces, items[t].rows.pieces,
                    sums + l * samples * 3, mean ? out + l : out + l * samples});
  }
  const std::vector<int64_t> one(ends.size(), 1);
  if (samples > 0)
    with_tables<true>(ends, [&](auto& table, size_t from) {
      const int64_t count = number_blocks(table, one.data() + from);
      gpu.launch(finish_kernel<A, sizeof(table.item) / sizeof(FinishItem)>, count, kThreads,
                 kSumsShared, table, samples, way, mean);
    });
  return true;
}

// Writes every dx. False where a tensor has too many dimensions.
template <typename A, typename Launcher>
bool rows_backward(Launcher& gpu, const std::vector<RowGradient>& jobs, int64_t samples,
                   int32_t way, bool mean, bool wide_grad) {
  std::vector<MixItem> items;
  std::vector<int64_t> blocks;
  for (const RowGradient& job : jobs) {
    MixItem item{};
    std::vector<const RowTensor*> tensors{&job.x, &job.dx};
    if (way != kNorms) tensors.push_back(&job.y);
    if (!cut_rows(item.rows, tensors, job.size, samples)) return false;
    if (item.rows.length == 0 || samples == 0) continue;
    item.sums = job.sums, item.grad = job.grad, item.grad_stride = job.grad_stride;
    item.side = job.side;
    items.push_back(item);
    blocks.push_back(blocks_of(item.rows));
  }
  const double scale = mean ? 1.0 / double(samples) : 1.0;
  with_tables<true>(items, [&](auto& table, size_t from) {
    const int64_t count = number_blocks(table, blocks.data() + from);
    constexpr int kItems = sizeof(table.item) / sizeof(MixItem);
    if (way == kNorms)
      gpu.launch(mix_kernel<A, false, kItems>, count, kThreads, 0, table, way, wide_grad, scale);
    else
      gpu.launch(mix_kernel<A, true, kItems>, count, kThreads, 0, table, way, wide_grad, scale);
  });
  return true;
}

}  // namespace lwkd::cuda
