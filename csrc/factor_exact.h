// Gradients that are vectors, and rows of an embedding: built in float64, where no difference of
// them loses its digits.
#pragma once

#include "factor_job.h"
#include "factor_tiles.h"

namespace lwkd {
namespace {

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
          add_product(x, weight + i, 0, from.length, to);
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
        add_product(p, q, 1, x.length, out + part.column);
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

}  // namespace
}  // namespace lwkd
