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
  RowTensor x, dx, y;  // y: not read where the other row does not count
  std::vector<int64_t> size;
  const double* sums;
  const void* grad;
  int64_t grad_stride;
  int32_t side;
};

// --- how rows are cut ----------------------------------------------------------------------------

constexpr int64_t kShortRow = 1024;  // rows up to here have a warp
constexpr int64_t kLongRow = 8192;  // and up to here, where there are rows enough; later two pieces
constexpr int64_t kBlocks = 4096;   // wanted, where rows are long enough to be cut
constexpr int64_t kMostPieces = 1024;

inline int64_t element_of(int32_t dtype) { return dtype == kDouble ? 8 : dtype == kFloat ? 4 : 2; }

struct Dim {
  int64_t size, stride[3];
};

// The dimensions of a row, innermost first in the first tensor's memory, merged where no tensor has
// a gap between them.
inline std::vector<Dim> dimensions(const std::vector<const RowTensor*>& tensors,
                                   const std::vector<int64_t>& size) {
  std::vector<Dim> all, dims;
  for (size_t d = 0; d < size.size(); ++d) {
    if (size[d] == 1) continue;
    Dim dim{size[d], {}};
    for (size_t k = 0; k < tensors.size(); ++k) dim.stride[k] = tensors[k]->stride[d];
    all.insert(all.begin(), dim);
  }
  std::stable_sort(all.begin(), all.end(),
                   [](const Dim& a, const Dim& b) { return a.stride[0] < b.stride[0]; });
  for (const Dim& dim : all) {
    bool merges = !dims.empty();
    for (size_t k = 0; merges && k < tensors.size(); ++k)
      merges = dim.stride[k] == dims.back().size * dims.back().stride[k];
    if (merges)
      dims.back().size *= dim.size;
    else
      dims.push_back(dim);
  }
  return dims;
}

// Few rows are cut into pieces that fill the GPU; nothing but shapes decides.
inline void cut_into_pieces(Rows& r) {
  const bool narrow = r.length <= kShortRow || (r.length <= kLongRow && r.n >= kBlocks);
  r.team = narrow ? 32 : kThreads;
  int64_t pieces = 1;
  if (!narrow)
    pieces =
        std::clamp<int64_t>(std::min(ceil_div(kBlocks, r.n), r.length / kLongRow), 1, kMostPieces);
  constexpr int64_t kStep = 8 * kThreads;  // pieces are whole packs of every dtype
  r.piece = ceil_div(ceil_div(r.length, pieces), kStep) * kStep;
  r.pieces = static_cast<int32_t>(ceil_div(r.length, r.piece));
}

// Rows of `tensors`: one, or one for every index of the dimensions beyond those a kernel knows;
// none where rows are empty.
inline std::vector<Rows> cut_rows(const std::vector<const RowTensor*>& tensors,
                                  const std::vector<int64_t>& size, int64_t n) {
  const std::vector<Dim> dims = dimensions(tensors, size);
  const size_t known = std::min<size_t>(dims.size(), kDims);
  Rows r{};
  r.n = n;
  r.length = 1;
  r.packs = true;
  r.dense = dims.size() <= 1;
  for (size_t k = 0; k < tensors.size(); ++k) {
    r.data[k] = tensors[k]->data;
    r.dtype[k] = tensors[k]->dtype;
    r.stride_n[k] = tensors[k]->stride_n;
    r.dense = r.dense && (dims.empty() || dims[0].stride[k] == 1);
  }
  for (size_t d = 0; d < known; ++d) {
    r.length *= r.size[d] = dims[d].size;
    for (size_t k = 0; k < tensors.size(); ++k) r.stride[k][d] = dims[d].stride[k];
  }
  r.size[known == 0 ? 0 : known - 1] = INT64_MAX;
  if (n == 0 || r.length == 0) return {};
  cut_into_pieces(r);
  std::vector<Rows> parts{r};
  for (size_t d = known; d < dims.size(); ++d) {
    std::vector<Rows> next;
    for (int64_t i = 0; i < dims[d].size; ++i) {
      for (Rows part : parts) {
        for (size_t k = 0; k < tensors.size(); ++k)
          part.data[k] =
              static_cast<char*>(part.data[k]) + i * dims[d].stride[k] * element_of(part.dtype[k]);
        next.push_back(part);
      }
    }
    parts = std::move(next);
  }
  return parts;
}

inline int64_t blocks_of(const Rows& r) { return ceil_div(r.n, kThreads / r.team) * r.pieces; }

// --- launching -----------------------------------------------------------------------------------

constexpr int64_t kTeamShared = kThreads / 32 * 3 * 8;

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

// Rows of one layout but for their alignment. Added up each for itself, in the order of their own
// packs, equal ones would not be at distance 0.
inline bool unlike_twins(const RowPair& pair) {
  const RowTensor &s = pair.s, &t = pair.t;
  const bool twins = pair.s_size == pair.t_size && s.dtype == t.dtype && s.stride == t.stride &&
                     s.stride_n == t.stride_n;
  const auto shift = reinterpret_cast<uintptr_t>(s.data) - reinterpret_cast<uintptr_t>(t.data);
  return twins && shift % 16 != 0;
}

// One pass over the rows of one or two tensors: its items, and where their sums go.
struct Pass {
  size_t first, count;  // of the items
  int64_t parts = 0;    // sums of a row
  int64_t offset = 0;   // in the scratch
};

inline Pass plan_pass(std::vector<SumItem>& items, Scratch& scratch,
                      const std::vector<const RowTensor*>& tensors,
                      const std::vector<int64_t>& size, int64_t n, int64_t terms, bool packs) {
  Pass pass{items.size(), 0};
  for (Rows rows : cut_rows(tensors, size, n)) {
    rows.packs = packs;
    items.push_back({0, rows, nullptr, 0});
    pass.parts += rows.pieces;
  }
  pass.count = items.size() - pass.first;
  pass.offset = scratch.reserve(n * pass.parts * terms, sizeof(double));
  return pass;
}

inline void place_pass(std::vector<SumItem>& items, const Scratch& scratch, const Pass& pass,
                       int64_t terms) {
  double* out = scratch.at<double>(pass.offset);
  for (size_t i = pass.first; i < pass.first + pass.count; ++i) {
    items[i].out = out;
    items[i].parts = pass.parts;
    out += items[i].rows.pieces * terms;
  }
}

// Threads of a row: as many as it has sums, of a warp.
inline int32_t lanes_of(int64_t parts) {
  int32_t lanes = 1;
  while (lanes < 32 && lanes < parts) lanes *= 2;
  return lanes;
}

template <typename Launcher>
void launch_sums(Launcher& gpu, const std::vector<SumItem>& items, int32_t way) {
  std::vector<int64_t> blocks;
  for (const SumItem& item : items) blocks.push_back(blocks_of(item.rows));
  with_tables<true>(items, [&](auto& table, size_t from) {
    const int64_t count = number_blocks(table, blocks.data() + from);
    with_way(way, [&](auto w) {
      gpu.launch(sums_kernel<w.value, sizeof(table.item) / sizeof(SumItem)>, count, kThreads,
                 kTeamShared, table);
    });
  });
}

template <typename A, typename Launcher>
void launch_distances(Launcher& gpu, const std::vector<DistanceItem>& items, int64_t samples,
                      int32_t way) {
  std::vector<int64_t> blocks;
  for (const DistanceItem& item : items) blocks.push_back(ceil_div(samples, kThreads / item.lanes));
  with_tables<true>(items, [&](auto& table, size_t from) {
    const int64_t count = number_blocks(table, blocks.data() + from);
    gpu.launch(distance_kernel<A, sizeof(table.item) / sizeof(DistanceItem)>, count, kThreads, 0,
               table, samples, way);
  });
}

// --- the two directions --------------------------------------------------------------------------

// Writes sums [L, N, 3] and out, [L] of the mean or [L, N].
template <typename A, typename Launcher>
void rows_forward(Launcher& gpu, const std::vector<RowPair>& pairs, int64_t samples, int32_t way,
                  bool mean, double* sums, A* out) {
  const int64_t length = pairs.size(), terms = way == kNormalized ? 3 : 1;
  if (samples == 0) return gpu.clear(out, mean ? length * sizeof(A) : 0);
  Scratch scratch;
  const int64_t each = mean ? scratch.reserve(length * samples, sizeof(double)) : 0;
  std::vector<SumItem> items;
  std::vector<Pass> passes;  // of kNorms two a layer
  for (const RowPair& pair : pairs) {
    const bool packs = way != kNorms || !unlike_twins(pair);
    const auto plan = [&](const std::vector<const RowTensor*>& tensors, const auto& size) {
      passes.push_back(plan_pass(items, scratch, tensors, size, samples, terms, packs));
    };
    if (way == kNorms)
      plan({&pair.s}, pair.s_size), plan({&pair.t}, pair.t_size);
    else
      plan({&pair.s, &pair.t}, pair.s_size);
  }
  scratch.data = static_cast<char*>(gpu.allocate(scratch.bytes));
  for (const Pass& pass : passes) place_pass(items, scratch, pass, terms);
  std::vector<DistanceItem> distances;
  const size_t step = passes.size() / pairs.size();
  for (int64_t l = 0; l < length; ++l) {
    const Pass &own = passes[l * step], &other = passes[(l + 1) * step - 1];
    void* to = mean ? static_cast<void*>(scratch.at<double>(each) + l * samples)
                    : static_cast<void*>(out + l * samples);
    distances.push_back({0,
                         {scratch.at<double>(own.offset), scratch.at<double>(other.offset)},
                         {own.parts, other.parts},
                         sums + l * samples * 3,
                         to,
                         lanes_of(std::max(own.parts, other.parts))});
  }
  launch_sums(gpu, items, way);
  if (!mean) return launch_distances<A>(gpu, distances, samples, way);
  launch_distances<double>(gpu, distances, samples, way);
  gpu.launch(mean_kernel<A>, length, kThreads, kTeamShared, scratch.at<const double>(each), samples,
             out);
}

// Writes every dx.
template <typename Launcher>
void rows_backward(Launcher& gpu, const std::vector<RowGradient>& jobs, int64_t samples,
                   int32_t way, bool mean, bool wide_grad) {
  std::vector<MixItem> items;
  std::vector<int64_t> blocks;
  for (const RowGradient& job : jobs) {
    std::vector<const RowTensor*> tensors{&job.x, &job.dx};
    if (way != kNorms) tensors.push_back(&job.y);
    for (const Rows& rows : cut_rows(tensors, job.size, samples)) {
      items.push_back({0, rows, job.sums, job.grad, job.grad_stride, job.side});
      blocks.push_back(blocks_of(rows));
    }
  }
  const double divisor = mean ? double(samples) : 1.0;
  with_tables<true>(items, [&](auto& table, size_t from) {
    const int64_t count = number_blocks(table, blocks.data() + from);
    constexpr int kItems = sizeof(table.item) / sizeof(MixItem);
    if (way == kNorms)
      gpu.launch(mix_kernel<false, kItems>, count, kThreads, kTeamShared, table, way, wide_grad,
                 divisor);
    else
      gpu.launch(mix_kernel<true, kItems>, count, kThreads, kTeamShared, table, way, wide_grad,
                 divisor);
  });
}

}  // namespace lwkd::cuda
