// How a call on Jacobian factors becomes products of matrices and launches around them. No torch
// here: tests/cuda/emulation runs it, with a launcher that multiplies as well:
//
//   gpu.multiply(batch, rows, inner, columns, x, y, out)     out[b] = x[b]·y[b], without gaps
//
// Two passes over all parameters: what of c the layers need (‖G_S‖², ‖G_T‖², and ‖a_S‖, ‖a_T‖ of
// every parameter), then the stacked factors, ‖U‖² and ⟨U, G_S⟩. Samples and groups are taken as
// many at a time as kFactorBytes hold.
#pragma once

#include <utility>

#include "factors_kernels.cuh"

namespace lwkd::cuda {

// One parameter: of both networks, or (kNorms) of one.
struct FactorItem {
  bool indices = false, gram = false;
  int64_t groups = 1, rows = 0, inputs = 1, outputs = 1;
  Source a[2] = {}, d[2] = {};
  Patches patches = {};    // of a
  Patches positions = {};  // of d
  Indices ids = {};
  int side = 0;  // of kNorms: whose it is, at [0]
  int64_t layer = 0;

  bool empty() const { return groups * rows * inputs * outputs == 0; }
};

// One tensor as torch has it; strides in elements. Of int64 the dtype is not read.
struct FactorTensor {
  const void* data;
  int32_t dtype;
  std::vector<int64_t> size, stride;
};

inline Source source_of(const FactorTensor& x) {
  return {x.data, x.dtype, x.stride[0], 0, 0, {}, {}};
}

// Rows along the last dimension, one tap.
inline Patches plain_rows(int64_t rows) {
  return {{1, 1, rows}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, 1};
}

// [N, T, K] or [N, G, T, K].
inline Source read_matrix(const FactorTensor& x) {
  Source s = source_of(x);
  const size_t at = x.size.size() - 2;
  if (at == 2) s.g = x.stride[1];
  s.channel = x.stride[at + 1];
  for (int k = 0; k < 3; ++k) s.size[k] = k == 2 ? x.size[at] : 1, s.space[k] = 0;
  s.space[2] = x.stride[at];
  return s;
}

// [N, C, *space], of channels in groups.
inline Source read_image(const FactorTensor& x, int64_t groups) {
  Source s = source_of(x);
  s.channel = x.stride[1], s.g = x.size[1] / groups * x.stride[1];
  const size_t front = 3 - (x.size.size() - 2);
  for (size_t k = 0; k < 3; ++k) {
    s.size[k] = k < front ? 1 : x.size[2 + k - front];
    s.space[k] = k < front ? 0 : x.stride[2 + k - front];
  }
  return s;
}

// One parameter from the tensors of one network or both, which are alike. `form` as
// lwkd/ops/factors.py's form_of says: 1 indices, 2 a convolution.
inline FactorItem read_factor(const std::vector<FactorTensor>& a,
                              const std::vector<FactorTensor>& d, const int64_t* form, bool gram) {
  FactorItem x;
  x.gram = gram, x.indices = form[0] == 1;
  if (form[0] == 2) {
    // A transposed convolution's gradient is that of an ordinary one from its output to its input.
    const std::vector<FactorTensor>&input = form[2] ? d : a, &output = form[2] ? a : d;
    x.groups = form[1];
    x.rows = x.patches.taps = 1;
    for (int k = 0; k < 3; ++k) {
      x.patches.kernel[k] = form[3 + k], x.patches.stride[k] = form[6 + k];
      x.patches.padding[k] = form[9 + k], x.patches.dilation[k] = form[12 + k];
      x.patches.taps *= x.patches.kernel[k];
    }
    for (size_t side = 0; side < a.size(); ++side) {
      x.a[side] = read_image(input[side], x.groups);
      x.d[side] = read_image(output[side], x.groups);
    }
    for (int k = 0; k < 3; ++k) x.patches.positions[k] = x.d[0].size[k], x.rows *= x.d[0].size[k];
    x.positions = {{}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, 1};
    std::copy_n(x.patches.positions, 3, x.positions.positions);
    x.inputs = input[0].size[1] / x.groups * x.patches.taps;
    x.outputs = output[0].size[1] / x.groups;
    return x;
  }
  const std::vector<int64_t>& size = d[0].size;
  x.groups = size.size() == 4 ? size[1] : 1;
  x.rows = size[size.size() - 2], x.outputs = size.back();
  x.inputs = x.indices ? 1 : a[0].size.back();
  x.patches = x.positions = plain_rows(x.rows);
  for (size_t side = 0; side < a.size(); ++side) {
    x.d[side] = read_matrix(d[side]);
    if (x.indices) {
      x.ids.ids[side] = static_cast<const int64_t*>(a[side].data);
      x.ids.n[side] = a[side].stride[0], x.ids.row[side] = a[side].stride[1];
    } else {
      x.a[side] = read_matrix(a[side]);
    }
  }
  return x;
}

// Matrices of a batch, without gaps between them.
template <typename A>
struct Strided {
  const A* data;
  int64_t row, column;

  Strided transposed() const { return {data, column, row}; }
};

#ifdef LWKD_EMULATE
constexpr int64_t kFactorBytes = 64 << 10, kTileNumbers = 1 << 11, kStepRows = 16, kGramRows = 16;
#else
constexpr int64_t kFactorBytes = 64 << 20, kTileNumbers = 1 << 21, kStepRows = 4096,
                  kGramRows = 1024;
#endif
constexpr int64_t kBatch = 1 << 15;  // what a batched product takes
constexpr int64_t kPartials = 2048;  // blocks of a dot_kernel wanted

inline int64_t clamped(int64_t x, int64_t least, int64_t most) {
  return std::max(least, std::min(x, most));
}

// How much of a parameter is in memory at a time, in numbers.
struct Cut {
  int64_t rows, outputs;                  // of the operands, and of the gradient
  int64_t samples, groups;                // of a chunk
  int64_t operand_a, operand_d, product;  // of a sample and group
};

inline Cut cut_item(const FactorItem& x, int64_t samples, int64_t element) {
  Cut cut{};
  const int64_t stacked = 2 * x.rows;
  if (x.gram || x.indices) {
    cut.outputs = x.outputs;
    const int64_t fit = kTileNumbers / std::max<int64_t>(x.inputs + x.outputs, 1);
    cut.rows = clamped(std::min(fit, kGramRows), 1, stacked);
    cut.product = cut.rows * cut.rows;
  } else {
    cut.outputs = clamped(kTileNumbers / std::max<int64_t>(x.inputs, 1), 1, x.outputs);
    const int64_t fit = kTileNumbers / std::max<int64_t>(x.inputs + cut.outputs, 1);
    cut.rows = clamped(std::min(fit, kStepRows), 1, stacked);
    cut.product = cut.outputs * x.inputs;
  }
  cut.operand_a = cut.rows * x.inputs, cut.operand_d = cut.rows * cut.outputs;
  const int64_t each = 2 * (cut.operand_a + cut.operand_d) + 3 * cut.product;
  const int64_t batch = clamped(kFactorBytes / element / std::max<int64_t>(each, 1), 1, kBatch);
  cut.groups = std::min(x.groups, batch);
  cut.samples = clamped(batch / cut.groups, 1, std::max<int64_t>(samples, 1));
  return cut;
}

template <typename A, typename Launcher>
class FactorCall {
 public:
  FactorCall(Launcher& gpu, const std::vector<FactorItem>& items, int64_t layers, int64_t samples,
             int32_t way)
      : gpu_(gpu),
        items_(items),
        layers_(layers),
        samples_(samples),
        way_(way == kSquareNorms ? kNorms : way),
        wanted_(way) {}

  // Writes out, [L] of the mean or [L, N].
  void run(bool mean, A* out) {
    if (samples_ == 0) return gpu_.clear(out, mean ? layers_ * sizeof(A) : 0);
    const int64_t count = items_.size();
    Scratch scratch;
    const int64_t sums = scratch.reserve(count * samples_ * kSlots, sizeof(double));
    const int64_t coefficients = scratch.reserve(count * samples_ * 2, sizeof(double));
    const int64_t partials = scratch.reserve(std::max(kPartials, samples_), sizeof(double));
    const int64_t each = mean ? scratch.reserve(layers_ * samples_, sizeof(double)) : 0;
    int64_t numbers = 0;
    for (const FactorItem& item : items_) {
      const Cut cut = cut_item(item, samples_, sizeof(A));
      numbers = std::max(numbers, cut.samples * cut.groups *
                                      (2 * (cut.operand_a + cut.operand_d) + 3 * cut.product));
    }
    const int64_t arena = scratch.reserve(numbers, sizeof(A));
    scratch.data = static_cast<char*>(gpu_.allocate(scratch.bytes));
    sums_ = scratch.at<double>(sums), coefficients_ = scratch.at<double>(coefficients);
    partials_ = scratch.at<double>(partials), arena_ = scratch.at<A>(arena);
    gpu_.clear(sums_, count * samples_ * kSlots * sizeof(double));
    for (int64_t i = 0; i < count; ++i) item(i, false);
    if (way_ != kNorms) {
      for_layers([&](int64_t, int64_t first, int64_t items) {
        gpu_.launch(ratio_kernel, ceil_div(samples_, kThreads), kThreads, 0, sums_of(first), items,
                    samples_, way_, coefficients_ + first * samples_ * 2);
      });
      for (int64_t i = 0; i < count; ++i) item(i, true);
    }
    for_layers([&](int64_t layer, int64_t first, int64_t items) {
      const int64_t blocks = ceil_div(samples_, kThreads);
      if (mean)
        gpu_.launch(factor_distance_kernel<double>, blocks, kThreads, 0, sums_of(first), items,
                    samples_, wanted_, scratch.at<double>(each) + layer * samples_);
      else
        gpu_.launch(factor_distance_kernel<A>, blocks, kThreads, 0, sums_of(first), items, samples_,
                    wanted_, out + layer * samples_);
    });
    if (mean)
      gpu_.launch(mean_kernel<A>, layers_, kThreads, kTeamBytes, scratch.at<const double>(each),
                  samples_, out);
  }

 private:
  static constexpr int64_t kTeamBytes = kThreads / 32 * 8;

  struct Chunk {
    int64_t n, samples, g, groups;

    int64_t batch() const { return samples * groups; }
  };

  double* sums_of(int64_t item) const { return sums_ + item * samples_ * kSlots; }

  // Calls run(layer, its first item, how many); items come layer by layer.
  template <typename Run>
  void for_layers(const Run& run) const {
    const int64_t count = items_.size();
    for (int64_t first = 0, last; first < count; first = last) {
      last = first + 1;
      while (last < count && items_[last].layer == items_[first].layer) ++last;
      run(items_[first].layer, first, last - first);
    }
  }

  // One pass over one parameter.
  void item(int64_t i, bool stacked) {
    const FactorItem& x = items_[i];
    if (x.empty()) return;
    const Cut cut = cut_item(x, samples_, sizeof(A));
    item_ = i, cut_ = cut;
    for (int64_t n = 0; n < samples_; n += cut.samples)
      for (int64_t g = 0; g < x.groups; g += cut.groups) {
        chunk_ = {n, std::min(cut.samples, samples_ - n), g, std::min(cut.groups, x.groups - g)};
        const int64_t batch = chunk_.batch();
        A* at = arena_;
        for (A** buffer : {&a_[0], &a_[1]}) *buffer = at, at += batch * cut.operand_a;
        for (A** buffer : {&d_[0], &d_[1]}) *buffer = at, at += batch * cut.operand_d;
        for (A** buffer : {&product_[0], &product_[1], &product_[2]})
          *buffer = at, at += batch * cut.product;
        if (stacked)
          stack(x);
        else
          squares(x);
      }
  }

  // What c is made of; of kNorms all there is.
  void squares(const FactorItem& x) {
    const int sides = way_ == kNorms ? 1 : 2;
    for (int side = 0; side < sides; ++side) {
      const Mixture own = side == 0 ? kStudentRows : kTeacherRows;
      if (way_ != kDifference) {
        const Slot slot = side + x.side == 0 ? kOwnSquare : kOtherSquare;
        if (x.gram || x.indices)
          gram({own, own}, {own, own}, true, slot);
        else
          for_outputs(x, [&](int64_t first, int64_t count) {
            build(x, own, own, first, count, product_[0]);
            dot(product_[0], product_[0], count * x.inputs, 1, slot);
          });
      }
      if (way_ == kNorms || x.indices) continue;
      for (int64_t row = 0; row < x.rows; row += cut_.rows) {
        const int64_t rows = std::min(cut_.rows, x.rows - row);
        gather_a(x, own, row, rows, a_[0]);
        dot(a_[0], a_[0], rows * x.inputs, 1, side == 0 ? kOwnA : kOtherA);
      }
    }
  }

  // ‖U‖² and, where it counts, ⟨U, G_S⟩.
  void stack(const FactorItem& x) {
    const bool along = way_ == kNormalized;
    if (x.gram || x.indices) {
      gram({kStackA, kStackD}, {kStackA, kStackD}, true, kStackSquare);
      if (along) gram({kStackA, kStackD}, {kStudentRows, kStudentRows}, false, kStackOwn);
      return;
    }
    for_outputs(x, [&](int64_t first, int64_t count) {
      build(x, kStackA, kStackD, first, count, product_[0]);
      dot(product_[0], product_[0], count * x.inputs, 1, kStackSquare);
      if (!along) return;
      build(x, kStudentRows, kStudentRows, first, count, product_[1]);
      dot(product_[0], product_[1], count * x.inputs, 1, kStackOwn);
    });
  }

  // --- direct: the gradient itself, [outputs, inputs], so many outputs at a time -----------------

  template <typename Run>
  void for_outputs(const FactorItem& x, const Run& run) const {
    for (int64_t first = 0; first < x.outputs; first += cut_.outputs)
      run(first, std::min(cut_.outputs, x.outputs - first));
  }

  void build(const FactorItem& x, Mixture mix_a, Mixture mix_d, int64_t first, int64_t count,
             A* out) {
    const int64_t length = mix_a == kStackA ? 2 * x.rows : x.rows;
    for (int64_t row = 0; row < length; row += cut_.rows) {
      const int64_t rows = std::min(cut_.rows, length - row);
      const Strided<A> a = gather_a(x, mix_a, row, rows, a_[0]);
      const Strided<A> d = gather_d(x, mix_d, row, rows, first, count, d_[0]);
      A* to = row == 0 ? out : product_[2];
      gpu_.multiply(chunk_.batch(), count, rows, x.inputs, d.transposed(), a, to);
      if (row == 0) continue;
      const int64_t total = chunk_.batch() * count * x.inputs;
      gpu_.launch(accumulate_kernel<A>, blocks_of(total), kThreads, 0, out, product_[2], total);
    }
  }

  // --- gram: Σ (a_r·a_r')(δ_r·δ_r') over the rows of one set and another -------------------------

  struct RowSet {
    Mixture a, d;

    int64_t length(const FactorItem& x) const { return a == kStackA ? 2 * x.rows : x.rows; }
  };

  void gram(const RowSet& one, const RowSet& other, bool symmetric, Slot slot) {
    const FactorItem& x = items_[item_];
    for (int64_t i = 0; i < one.length(x); i += cut_.rows) {
      const int64_t rows = std::min(cut_.rows, one.length(x) - i);
      Strided<A> a{}, d = gather_d(x, one.d, i, rows, 0, x.outputs, d_[0]);
      if (!x.indices) a = gather_a(x, one.a, i, rows, a_[0]);
      for (int64_t j = symmetric ? i : 0; j < other.length(x); j += cut_.rows) {
        const int64_t columns = std::min(cut_.rows, other.length(x) - j);
        const bool same = symmetric && i == j;
        Strided<A> b = a, e = d;
        if (!same) {
          e = gather_d(x, other.d, j, columns, 0, x.outputs, d_[1]);
          if (!x.indices) b = gather_a(x, other.a, j, columns, a_[1]);
        }
        if (x.indices)
          index_gram(x, {one.a, other.a}, {i, j}, {rows, columns}, product_[0]);
        else
          gpu_.multiply(chunk_.batch(), rows, x.inputs, columns, a, b.transposed(), product_[0]);
        gpu_.multiply(chunk_.batch(), rows, x.outputs, columns, d, e.transposed(), product_[1]);
        dot(product_[0], product_[1], rows * columns, symmetric && i != j ? 2 : 1, slot);
      }
    }
  }

  void index_gram(const FactorItem& x, std::pair<Mixture, Mixture> mixture,
                  std::pair<int64_t, int64_t> row, std::pair<int64_t, int64_t> rows, A* out) {
    const IndexGram gram{x.ids,          {mixture.first, mixture.second}, chunk_.n,
                         chunk_.samples, {row.first, row.second},         {rows.first, rows.second},
                         x.rows};
    const int64_t total = chunk_.samples * rows.first * rows.second;
    gpu_.launch(index_gram_kernel<A>, blocks_of(total), kThreads, 0, gram, total, out);
  }

  // --- small things ------------------------------------------------------------------------------

  Strided<A> gather_a(const FactorItem& x, Mixture mixture, int64_t row, int64_t rows, A* out) {
    return gather(x.a, x.patches, mixture, row, rows, 0, x.inputs, 0, out);
  }
  Strided<A> gather_d(const FactorItem& x, Mixture mixture, int64_t row, int64_t rows,
                      int64_t column, int64_t columns, A* out) {
    return gather(x.d, x.positions, mixture, row, rows, column, columns, 1, out);
  }

  Strided<A> gather(const Source (&source)[2], const Patches& patches, Mixture mixture, int64_t row,
                    int64_t rows, int64_t column, int64_t columns, int which, A* out) {
    const Source& s = source[0];
    Gather x{};
    x.s = s, x.t = source[1], x.patches = patches, x.mixture = mixture;
    // What is read from neighbour to neighbour in memory is written so, as far as it can be.
    x.by_column = columns > 1 && s.space[2] < s.channel;
    x.n = chunk_.n, x.samples = chunk_.samples, x.g = chunk_.g, x.groups = chunk_.groups;
    x.row = row, x.rows = rows, x.column = column, x.columns = columns;
    x.length = items_[item_].rows;
    x.c = coefficients_ + item_ * samples_ * 2 + which;
    const int64_t total = chunk_.batch() * rows * columns;
    gpu_.launch(gather_kernel<A>, blocks_of(total), kThreads, 0, x, total, out);
    return x.by_column ? Strided<A>{out, 1, rows} : Strided<A>{out, columns, 1};
  }

  // Adds Σ x·y over `each` numbers of every sample and group.
  void dot(const A* x, const A* y, int64_t each, double weight, Slot slot) {
    const int64_t length = chunk_.groups * each;
    const int32_t pieces = static_cast<int32_t>(
        clamped(std::min(kPartials / chunk_.samples, length / (8 * kThreads)), 1, 256));
    gpu_.launch(dot_kernel<A>, chunk_.samples * pieces, kThreads, kTeamBytes, x, y, length, pieces,
                partials_);
    gpu_.launch(add_kernel, ceil_div(chunk_.samples, kThreads), kThreads, 0, partials_,
                chunk_.samples, pieces, weight, sums_of(item_) + chunk_.n * kSlots + slot);
  }

  static int64_t blocks_of(int64_t total) {
    return clamped(ceil_div(total, 4 * kThreads), 1, 1 << 14);
  }

  Launcher& gpu_;
  const std::vector<FactorItem>& items_;
  int64_t layers_, samples_;
  int32_t way_, wanted_;
  double *sums_ = nullptr, *coefficients_ = nullptr, *partials_ = nullptr;
  A* arena_ = nullptr;
  int64_t item_ = 0;
  Cut cut_{};
  Chunk chunk_{};
  A *a_[2] = {}, *d_[2] = {}, *product_[3] = {};
};

}  // namespace lwkd::cuda
