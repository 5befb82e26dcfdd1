// What one task of the factors' kernel adds up: ‖U‖², ⟨U, G_S⟩ and ‖G_S‖² (of kNorms ‖G‖²) of one
// item, sample and tile, by whichever way the item takes.
#pragma once

#include <cmath>
#include <optional>

#include "factors.h"
#include "jacobian.h"

namespace lwkd {
namespace {

using Sums = std::array<double, 3>;

constexpr int64_t kRows = 256;         // rows of a block of a gram
constexpr int64_t kColumns = 512;      // of what is multiplied at a time
constexpr int64_t kSteps = 512;        // rows that go into a gradient at a time
constexpr int64_t kNumbers = 1 << 17;  // of a tile of a gradient
constexpr int64_t kPlane = 1 << 19;    // of a convolution's channels taken at a time

// `total` in parts of one size, none above `limit`, but the last.
struct Split {
  Split(int64_t total_, int64_t limit)
      : total(total_),
        count(std::max<int64_t>(1, (total + limit - 1) / limit)),
        size((total + count - 1) / count) {}

  int64_t begin(int64_t i) const { return std::min(i * size, total); }
  int64_t length(int64_t i) const { return begin(i + 1) - begin(i); }

  int64_t total, count, size;
};

// Both gradients are off by some 3e-8·√T of themselves, number by number: from so far apart on, as
// a share of their norm, that is within the digits that are promised of their difference.
inline double far_enough(const Item& item) {
  const double numbers = double(item.inputs) * item.outputs * item.groups;
  return std::max(3e-3, 0.12 * std::sqrt(item.rows / std::max(numbers, 1.0)));
}

// One parameter of a layer; of kNorms that of one network alone.
struct Job {
  Item student, teacher;
  int64_t layer = 0;
  bool gram = false;
  int slot = 0;                           // where its sums go
  std::optional<RowWalk> walk_a, walk_d;  // both networks' numbers

  bool indices() const { return student.form == kIndices; }
  // Whether G is built, tile by tile, of which there are more and less exact ways.
  bool builds() const { return !gram && !indices() && !student.thin(); }

  // Whether the library is called: its products are to be one thread's, and a region makes them so.
  bool library() const {
    if (!gram && !builds()) return false;
    if (student.form == kConvolution && !gram) return true;
    const int64_t r = row_blocks().size;
    const int64_t most = gram ? r * r * std::max(student.inputs, student.outputs)
                              : student.rows * student.inputs * student.outputs;
    return most > kSmall;
  }

  Split row_blocks() const { return {student.rows, kRows}; }
  Split input_blocks() const { return {student.inputs, kLine}; }
  Split output_blocks() const {
    const int64_t fit = kNumbers / std::max<int64_t>(input_blocks().size, 1);
    return {student.outputs, std::clamp<int64_t>(fit, 16, kLine)};
  }
  // Of a convolution: of groups where there are several, else of the channels of y and of x.
  Split group_blocks() const {
    if (student.groups == 1) return {1, 1};
    const int64_t weight = student.inputs * student.outputs;
    const int64_t x = student.x->size(1) / student.groups * x_plane();
    const int64_t plane = std::max(x, student.outputs * student.rows);
    const int64_t fit = std::min(2 * kNumbers / std::max<int64_t>(weight, 1), kPlane / plane);
    return {student.groups, std::max<int64_t>(1, fit)};
  }
  Split y_blocks() const {
    if (student.groups > 1) return {1, 1};
    const int64_t by_weight = 2 * kNumbers / std::max<int64_t>(student.inputs, 1);
    const int64_t by_plane = kPlane / std::max<int64_t>(student.rows, 1);
    return {student.outputs, std::max<int64_t>(16, std::min(by_weight, by_plane))};
  }
  Split x_blocks() const {
    if (student.groups > 1) return {1, 1};
    return {student.x->size(1), std::max<int64_t>(1, kPlane / x_plane())};
  }
  int64_t x_plane() const {
    int64_t count = 1;
    for (const int64_t s : student.space) count *= s;
    return std::max<int64_t>(count, 1);
  }

  int64_t tiles() const {
    if (indices() || student.thin()) return 1;
    if (gram) return student.groups * row_blocks().count * (row_blocks().count + 1) / 2;
    if (student.form == kDense)
      return student.groups * output_blocks().count * input_blocks().count;
    return group_blocks().count * y_blocks().count * x_blocks().count;
  }
  // About how many numbers' time a task takes: the library does a hundred multiplications in that.
  int64_t cost(How how) const {
    const Item& s = student;
    const int64_t ways = how == kNorms ? 1 : how == kNormalized ? 3 : 2;
    int64_t all = 0;
    if (indices() || s.thin())
      all = 2 * s.groups * s.rows * (s.inputs + s.outputs);
    else if (gram)
      all = s.groups * s.rows * (s.inputs + s.outputs) * (3 * s.rows / 100 + 4);
    else
      all = s.groups * s.rows * s.inputs * s.outputs / 100 * ways + s.rows * s.outputs * ways;
    return all / tiles() + 1024;
  }
  // Numbers that a thread keeps.
  int64_t scratch() const {
    if (indices()) return 4 * student.outputs + 2 * student.rows * student.outputs;
    if (student.thin()) return 4 * std::max(student.inputs, student.outputs);
    if (gram) {
      const int64_t r = row_blocks().size, blocks = row_blocks().count > 1 ? 4 : 2;
      return blocks * r * std::min(std::max(student.inputs, student.outputs), kColumns) + 8 * r * r;
    }
    if (student.form == kDense) {
      const int64_t i = input_blocks().size, o = output_blocks().size;
      return 2 * std::min(student.rows, kSteps) * (i + o) + 4 * i * o;
    }
    const int64_t weight = 3 * y_blocks().size * group_blocks().size * student.inputs;
    return weight + 3 * (x_blocks().size * x_plane() + y_blocks().size * student.rows);
  }
};

// What a task is asked for.
struct Ask {
  int64_t n = 0, tile = 0;
  How how = kDifference;
  bool stacked = true;
  double c = 1, c_a = 1;

  double c_d() const { return c / c_a; }
};

// --- sums over tiles -------------------------------------------------------------------------

// Of blocks P and Q of both grams, rows and columns of one block: 11, 12, 22.
template <typename A>
LWKD_INLINE void add_own(const A* const* p, const A* const* q, int64_t count, double* out) {
  sum_piece<3>(p[0], q[0], count, out, [&](auto v, int64_t i) LWKD_LAMBDA {
    using V = decltype(v);
    const V p11 = read<V>(p[0] + i), p12 = read<V>(p[1] + i), p22 = read<V>(p[2] + i);
    const V q11 = read<V>(q[0] + i), q12 = read<V>(q[1] + i), q22 = read<V>(q[2] + i);
    const V twelve = p12 * q12, eleven = p11 * q11, cross = p11 * q12;
    return std::array<V, 3>{eleven + 2 * twelve + p22 * q22, eleven + cross + twelve + p12 * q22,
                            eleven + 2 * cross + p11 * q22};
  });
}

// Of two blocks, each pair of which stands for two: 11, 12, 21, 22.
template <typename A>
LWKD_INLINE void add_cross(const A* const* p, const A* const* q, int64_t count, double* out) {
  sum_piece<3>(p[0], q[0], count, out, [&](auto v, int64_t i) LWKD_LAMBDA {
    using V = decltype(v);
    const V p11 = read<V>(p[0] + i), p12 = read<V>(p[1] + i);
    const V p21 = read<V>(p[2] + i), p22 = read<V>(p[3] + i);
    const V q11 = read<V>(q[0] + i), q12 = read<V>(q[1] + i);
    const V q21 = read<V>(q[2] + i), q22 = read<V>(q[3] + i);
    return std::array<V, 3>{2 * (p11 * q11 + p12 * q12 + p21 * q21 + p22 * q22),
                            p11 * (2 * q11 + q12 + q21) + p21 * (q21 + q22) + p12 * (q12 + q22),
                            2 * p11 * (q11 + q12 + q21 + q22)};
  });
}

template <typename A>
LWKD_INLINE void add_inner(const A* p, const A* q, int64_t count, double* out) {
  sum_piece<1>(p, q, count, out, [&](auto v, int64_t i) LWKD_LAMBDA {
    using V = decltype(v);
    return std::array<V, 1>{read<V>(p + i) * read<V>(q + i)};
  });
}

// u = first + second, and g: ‖u‖², ⟨u, g⟩, ‖g‖².
template <typename A>
LWKD_INLINE void add_halves(const A* first, const A* second, const A* g, int64_t count,
                            double* out) {
  sum_piece<3>(first, second, count, out, [&](auto v, int64_t i) LWKD_LAMBDA {
    using V = decltype(v);
    const V u = read<V>(first + i) + read<V>(second + i), own = read<V>(g + i);
    return std::array<V, 3>{u * u, u * own, own * own};
  });
}

#define LWKD_TILES(A)                                                                        \
  LWKD_CLONES void own(const A* const* p, const A* const* q, int64_t count, double* out) {   \
    add_own(p, q, count, out);                                                               \
  }                                                                                          \
  LWKD_CLONES void cross(const A* const* p, const A* const* q, int64_t count, double* out) { \
    add_cross(p, q, count, out);                                                             \
  }                                                                                          \
  LWKD_CLONES void inner(const A* p, const A* q, int64_t count, double* out) {               \
    add_inner(p, q, count, out);                                                             \
  }                                                                                          \
  LWKD_CLONES void two_halves(const A* first, const A* second, const A* g, int64_t count,    \
                              double* out) {                                                 \
    add_halves(first, second, g, count, out);                                                \
  }                                                                                          \
  LWKD_CLONES void add_product(const A* x, int64_t x_stride, const A* y, int64_t y_stride,   \
                               int64_t count, double* to) {                                  \
    if (x_stride == 1 && y_stride == 1)                                                      \
      for (int64_t i = 0; i < count; ++i) to[i] += double(x[i]) * double(y[i]);              \
    else                                                                                     \
      for (int64_t i = 0; i < count; ++i)                                                    \
        to[i] += double(x[i * x_stride]) * double(y[i * y_stride]);                          \
  }                                                                                          \
  LWKD_CLONES void add_to(const A* x, int64_t count, double* to) {                           \
    for (int64_t i = 0; i < count; ++i) to[i] += x[i];                                       \
  }
LWKD_TILES(float)
LWKD_TILES(double)

// From G_S and G_T, both built in float64 or far enough apart: products of s, t as U = s − c·t.
Sums from_both(const double* products, How how, double c) {
  const double ss = products[0], tt = products[1], st = products[2];
  if (how == kNorms) return {ss, 0, 0};
  return {std::max(ss - 2 * c * st + c * c * tt, 0.0), ss - c * st, ss};
}

// --- gradients that are vectors, and rows of an embedding: built in float64 ----------------------

// U, G_S of a piece of both gradients.
LWKD_CLONES void add_exact(const double* s, const double* t, int64_t count, double c, double* out) {
  for (int64_t i = 0; i < count; ++i) {
    const double u = s[i] - c * t[i];
    out[0] += u * u, out[1] += u * s[i], out[2] += s[i] * s[i];
  }
}

// Σ_t a[t] d[t] of one group, [inputs · outputs].
template <typename A>
void build_thin(const Item& item, int64_t n, int64_t g, double* out, Scratch<A>& scratch) {
  const bool wide = item.outputs > 1;
  const View& v = wide ? item.d : item.a;  // the one that has columns
  const View& w = wide ? item.a : item.d;
  const int64_t count = std::max(item.inputs, item.outputs);
  std::fill_n(out, count, 0.0);
  const bool by_column = lies_by_column(v);
  const Split columns(count, kLine), rows(item.rows, kLine);
  A* const buffer[2] = {scratch.get(0, kLine), scratch.get(1, kLine)};
  for (int64_t r = 0; r < rows.count; ++r) {
    const Part one{n, g, rows.begin(r), rows.length(r), 0, 1};
    const Lines weights(w, one, true);
    const A* weight = line(weights.at(0), w.dtype, weights.stride, weights.length, buffer[0]);
    for (int64_t k = 0; k < columns.count; ++k) {
      const Part part{n, g, one.row, one.rows, columns.begin(k), columns.length(k)};
      const Lines from(v, part, by_column);
      double* const to = out + part.column;
      for (int64_t i = 0; i < from.count; ++i) {
        const A* x = line(from.at(i), v.dtype, from.stride, from.length, buffer[1]);
        double sum = 0;
        if (by_column)
          inner(x, weight, from.length, &sum), to[i] += sum;
        else
          add_product(x, 1, weight + i, 0, from.length, to);
      }
    }
  }
}

// A group of one number each, side by side: all groups at once.
template <typename A>
void build_groups(const Item& item, int64_t n, double* out, Scratch<A>& scratch) {
  std::fill_n(out, item.groups, 0.0);
  View a = item.a, d = item.d;
  a.column = a.g, d.column = d.g, a.g = d.g = 0;
  const Split columns(item.groups, kLine);
  A* const buffer[2] = {scratch.get(0, kLine), scratch.get(1, kLine)};
  for (int64_t k = 0; k < columns.count; ++k) {
    const Part part{n, 0, 0, item.rows, columns.begin(k), columns.length(k)};
    const bool by_column = lies_by_column(d) && part.rows <= kLine;
    const Lines x(a, part, by_column), y(d, part, by_column);
    for (int64_t i = 0; i < x.count; ++i) {
      const A* p = line(x.at(i), a.dtype, x.stride, x.length, buffer[0]);
      const A* q = line(y.at(i), d.dtype, y.stride, y.length, buffer[1]);
      double sum = 0;
      if (by_column)
        inner(p, q, x.length, &sum), out[part.column + i] += sum;
      else
        add_product(p, 1, q, 1, x.length, out + part.column);
    }
  }
}

template <typename A>
Sums thin_sums(const Job& job, const Ask& ask, Scratch<A>& scratch) {
  const Item& s = job.student;
  const bool single = s.inputs == 1 && s.outputs == 1;
  const int64_t count = single ? s.groups : std::max(s.inputs, s.outputs);
  std::vector<double> own(count), other(count, 0.0);
  Sums sums{};
  for (int64_t g = 0; g < (single ? 1 : s.groups); ++g) {
    const auto build = [&](const Item& item, double* out) {
      single ? build_groups(item, ask.n, out, scratch) : build_thin(item, ask.n, g, out, scratch);
    };
    build(s, own.data());
    if (ask.how != kNorms) build(job.teacher, other.data());
    add_exact(own.data(), other.data(), count, ask.c, sums.data());
  }
  return sums;
}

// The rows that come up, one after the other.
template <typename A>
Sums index_sums(const Job& job, const Ask& ask, Scratch<A>& scratch) {
  std::vector<std::pair<int64_t, int64_t>> uses;  // (row, use): the teacher's behind the student's
  const Item* items[2] = {&job.student, &job.teacher};
  for (int side = 0; side < (ask.how == kNorms ? 1 : 2); ++side) {
    const View& a = items[side]->a;
    const int64_t* from = reinterpret_cast<const int64_t*>(a.data) + ask.n * a.n;
    for (int64_t t = 0; t < items[side]->rows; ++t)
      uses.emplace_back(from[t * a.row], side * job.student.rows + t);
  }
  std::sort(uses.begin(), uses.end());
  const Split columns(job.student.outputs, kLine);
  Sums sums{};
  std::vector<double> own(columns.size), other(columns.size);
  A* const buffer = scratch.get(0, kLine);
  for (int64_t k = 0; k < columns.count; ++k)
    for (size_t i = 0; i < uses.size();) {
      std::fill(own.begin(), own.end(), 0.0), std::fill(other.begin(), other.end(), 0.0);
      const int64_t row = uses[i].first, count = columns.length(k);
      for (; i < uses.size() && uses[i].first == row; ++i) {
        const int64_t side = uses[i].second >= job.student.rows;
        const View& d = items[side]->d;
        const Part part{ask.n, 0, uses[i].second - side * job.student.rows, 1, columns.begin(k),
                        count};
        const Lines from(d, part, false);
        const A* x = line(from.at(0), d.dtype, from.stride, count, buffer);
        add_to(x, count, side ? other.data() : own.data());
      }
      add_exact(own.data(), other.data(), count, ask.c, sums.data());
    }
  return sums;
}

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
