// What one task of the factors' kernel adds up: ‖U‖², ⟨U, G_S⟩ and ‖G_S‖² (of kNorms ‖G‖²) of one
// item, sample and tile, by whichever way the item takes.
#pragma once

#include "factor_exact.h"

namespace lwkd {
namespace {

// --- grams ---------------------------------------------------------------------------------------

// Both halves of the stacked factors' rows: s and s − c·t, or s − c·t and c·t.
template <typename A>
struct Halves {
  Matrix<A> first, second;
};

// Of a; of kNorms the first alone. `slot`: the first of three.
template <typename A>
Halves<A> a_halves(const Job& job, const Ask& ask, const Part& p, Scratch<A>& scratch, int slot) {
  const Item &s = job.student, &t = job.teacher;
  const int64_t count = p.rows * p.columns;
  Halves<A> out;
  if (s.form == kDense) {
    out.first = block(s.a, p, 1, scratch.get(slot, count));
    if (ask.how != kNorms) out.second = minus(s.a, t.a, p, ask.c_a, scratch.get(slot + 1, count));
    return out;
  }
  const int64_t taps = s.conv.taps(), channels = s.x->size(1) / s.groups;
  const int64_t begin = p.g * channels + p.column / taps, end = begin + p.columns / taps;
  const int64_t plane = (end - begin) * job.x_plane();
  const Image<A> own = image(*s.x, p.n, begin, end, s.space, scratch.get(9, plane));
  out.first = patches(own, s, p, scratch.get(slot, count));
  if (ask.how == kNorms) return out;
  const Image<A> other = image(*t.x, p.n, begin, end, s.space, scratch.get(10, plane));
  const Image<A> near = mixed(own, &other, 1, -ask.c_a, scratch.get(11, plane));
  out.second = patches(near, s, p, scratch.get(slot + 1, count));
  return out;
}

// A convolution's y as matrices [positions, channels of a group].
template <typename A>
View y_view(const Item& item, const Part& p, A* buffer) {
  if (item.d.row >= 0) return item.d;
  const int64_t begin = p.g * item.outputs + p.column;
  const Image<A> y = image(*item.y, p.n, begin, begin + p.columns, item.positions, buffer);
  View v;
  v.data = reinterpret_cast<char*>(const_cast<A*>(y.data - p.column * item.rows));
  v.dtype = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
  v.row = 1, v.column = item.rows;
  return v;
}

template <typename A>
Halves<A> d_halves(const Job& job, const Ask& ask, const Part& p, Scratch<A>& scratch, int slot) {
  const Item &s = job.student, &t = job.teacher;
  const int64_t count = p.rows * p.columns;
  const bool copied = s.d.row < 0 || (ask.how != kNorms && t.d.row < 0);
  const int64_t plane = copied ? p.columns * s.rows : 0;
  const View own = y_view(s, p, scratch.get(9, plane));
  Halves<A> out;
  if (ask.how == kNorms) {
    out.first = block(own, p, 1, scratch.get(slot, count));
    return out;
  }
  const View other = y_view(t, p, scratch.get(10, plane));
  out.first = minus(own, other, p, ask.c_d(), scratch.get(slot, count));
  out.second = block(other, p, ask.c_d(), scratch.get(slot + 1, count));
  return out;
}

// Columns of a that are taken at a time: whole channels.
inline Split chunks(const Item& item, int64_t columns, bool a) {
  if (!a || item.form == kDense) return {columns, kColumns};
  const int64_t taps = item.conv.taps();
  Split out(columns / taps, std::max<int64_t>(1, kColumns / taps));
  out.total *= taps, out.size *= taps;
  return out;
}

// Σ_{t,t'} (A_t·A_t')(Δ_t·Δ_t') over one pair of blocks of rows.
template <typename A>
Sums gram_sums(const Job& job, const Ask& ask, Scratch<A>& scratch) {
  const Split blocks = job.row_blocks();
  const int64_t pairs = blocks.count * (blocks.count + 1) / 2;
  int64_t i = 0, left = ask.tile % pairs;
  for (; left >= blocks.count - i; ++i) left -= blocks.count - i;
  const int64_t j = i + left, g = ask.tile / pairs;
  const int64_t rows = blocks.length(i), columns = blocks.length(j), count = rows * columns;
  const A* zeros = scratch.zeros(count);
  const bool halves = ask.how != kNorms;
  std::vector<Product<A>> grams[2];
  for (int side = 0; side < 2; ++side) {
    std::vector<Product<A>>& gram = grams[side];
    gram.assign(!halves ? 1 : i == j ? 3 : 4, Product<A>(rows, columns));
    const Split parts = chunks(job.student, side ? job.student.outputs : job.student.inputs, !side);
    for (int64_t k = 0; k < parts.count; ++k) {
      const auto get = [&](int64_t b, int slot) {
        const Part p{ask.n, g, blocks.begin(b), blocks.length(b), parts.begin(k), parts.length(k)};
        return side ? d_halves(job, ask, p, scratch, slot) : a_halves(job, ask, p, scratch, slot);
      };
      const Halves<A> x = get(i, 0);
      const Halves<A> y = i == j ? x : get(j, 3);
      gram[0].add(x.first, y.first, zeros);
      if (!halves) continue;
      gram[1].add(x.first, y.second, zeros);
      if (i != j) gram[2].add(x.second, y.first, zeros);
      gram[i == j ? 2 : 3].add(x.second, y.second, zeros);
    }
  }
  const A *p[4] = {}, *q[4] = {};
  for (size_t k = 0; k < grams[0].size(); ++k) p[k] = grams[0][k].data(), q[k] = grams[1][k].data();
  Sums sums{};
  if (!halves) {
    inner(p[0], q[0], count, sums.data());
    sums[0] *= i == j ? 1 : 2;
  } else {
    i == j ? own(p, q, count, sums.data()) : cross(p, q, count, sums.data());
  }
  return sums;
}

// --- gradients that are built --------------------------------------------------------------------

template <typename A>
Sums direct_sums(const Job& job, const Ask& ask, Scratch<A>& scratch) {
  const Item &s = job.student, &t = job.teacher;
  const Split outputs = job.output_blocks(), inputs = job.input_blocks(), steps(s.rows, kSteps);
  const int64_t i = ask.tile % inputs.count, o = ask.tile / inputs.count % outputs.count;
  const int64_t g = ask.tile / inputs.count / outputs.count;
  const int64_t m = outputs.length(o), k = inputs.length(i), count = m * k;
  const A* zeros = scratch.zeros(count);
  Product<A> own(m, k), other(m, k);  // G_S; G_T or U
  for (int64_t r = 0; r < steps.count; ++r) {
    const int64_t rows = steps.length(r);
    const Part pa{ask.n, g, steps.begin(r), rows, inputs.begin(i), k};
    const Part pd{ask.n, g, steps.begin(r), rows, outputs.begin(o), m};
    const auto add = [&](Product<A>& to, const Matrix<A>& d, const Matrix<A>& a) {
      to.add(d.transposed(), a.transposed(), zeros);
    };
    const bool stacked = ask.stacked && ask.how != kNorms;
    const Matrix<A> a = block(s.a, pa, 1, scratch.get(0, rows * k));
    if (!stacked || ask.how == kNormalized)
      add(own, block(s.d, pd, 1, scratch.get(1, rows * m)), a);
    if (stacked) {
      const Halves<A> d = d_halves(job, ask, pd, scratch, 2);
      add(other, d.first, a);
      add(other, d.second, minus(s.a, t.a, pa, ask.c_a, scratch.get(4, rows * k)));
    } else if (ask.how != kNorms) {
      add(other, block(t.d, pd, 1, scratch.get(2, rows * m)),
          block(t.a, pa, 1, scratch.get(4, rows * k)));
    }
  }
  double out[3] = {};
  if (ask.how == kNorms) {
    squares(own.data(), nullptr, count, out);
    return {out[0], 0, 0};
  }
  if (!ask.stacked) {
    products(own.data(), other.data(), count, out);
    return from_both(out, ask.how, ask.c);
  }
  if (ask.how == kDifference) {
    squares(other.data(), nullptr, count, out);
    return {out[0], 0, 0};
  }
  products(other.data(), own.data(), count, out);
  return {out[0], out[2], out[1]};
}

template <typename A>
Sums convolution_sums(const Job& job, const Ask& ask, Scratch<A>& scratch) {
  const Item &s = job.student, &t = job.teacher;
  const Split groups = job.group_blocks(), ys = job.y_blocks(), xs = job.x_blocks();
  const int64_t ix = ask.tile % xs.count, iy = ask.tile / xs.count % ys.count;
  const int64_t ig = ask.tile / xs.count / ys.count, count_g = groups.length(ig);
  const bool whole = s.groups > 1;  // whole groups at a time
  const int64_t x_group = s.x->size(1) / s.groups;
  const int64_t x0 = whole ? groups.begin(ig) * x_group : xs.begin(ix);
  const int64_t x1 = x0 + (whole ? count_g * x_group : xs.length(ix));
  const int64_t y0 = whole ? groups.begin(ig) * s.outputs : ys.begin(iy);
  const int64_t y1 = y0 + (whole ? count_g * s.outputs : ys.length(iy));
  const int64_t x_count = (x1 - x0) * job.x_plane(), y_count = (y1 - y0) * s.rows;
  const auto get_x = [&](const Item& item, int slot) {
    return image(*item.x, ask.n, x0, x1, item.space, scratch.get(slot, x_count));
  };
  const auto get_y = [&](const Item& item, int slot) {
    return image(*item.y, ask.n, y0, y1, item.positions, scratch.get(slot, y_count));
  };
  const auto gradient = [&](const Image<A>& x, const Image<A>& y) {
    return torch::stable::contiguous(weight_gradient(x, y, s.conv, whole ? count_g : 1));
  };
  const auto data = [](const Tensor& g) { return static_cast<const A*>(g.const_data_ptr()); };
  const Image<A> x = get_x(s, 0), y = get_y(s, 1);
  double out[3] = {};
  if (ask.how == kNorms) {
    const Tensor own = gradient(x, y);
    squares(data(own), nullptr, own.numel(), out);
    return {out[0], 0, 0};
  }
  const Image<A> tx = get_x(t, 2), ty = get_y(t, 3);
  if (!ask.stacked) {
    const Tensor own = gradient(x, y), other = gradient(tx, ty);
    products(data(own), data(other), own.numel(), out);
    return from_both(out, ask.how, ask.c);
  }
  const Image<A> near_y = mixed(y, &ty, 1, -ask.c_d(), scratch.get(4, y_count));
  const Tensor first = gradient(x, near_y);
  const Image<A> near_x = mixed(x, &tx, 1, -ask.c_a, scratch.get(5, x_count));
  const Image<A> scaled =
      ask.c_d() == 1 ? ty : mixed<A>(ty, nullptr, ask.c_d(), 0, scratch.get(6, y_count));
  const Tensor second = gradient(near_x, scaled);
  const bool normalized = ask.how == kNormalized;
  const Tensor own = normalized ? gradient(x, y) : first;
  two_halves(data(first), data(second), data(own), first.numel(), out);
  return {out[0], normalized ? out[1] : 0, normalized ? out[2] : 0};
}

template <typename A>
Sums job_sums(const Job& job, const Ask& ask, Scratch<A>& scratch) {
  const Item& s = job.student;
  if (s.rows == 0 || s.inputs == 0 || s.outputs == 0 || s.groups == 0) return {};
  if (job.indices()) return index_sums(job, ask, scratch);
  if (s.thin()) return thin_sums(job, ask, scratch);
  if (job.gram) return gram_sums(job, ask, scratch);
  if (s.form == kDense) return direct_sums(job, ask, scratch);
  return convolution_sums(job, ask, scratch);
}

}  // namespace
}  // namespace lwkd
