// What the two forms of the Jacobian kind, rows and factors, have in common.
#pragma once

#include <vector>

#include "common.h"

namespace lwkd {

constexpr double kEps = 1e-12;  // what a shorter norm is replaced by

enum How { kDifference, kNormalized, kNorms };

inline How read_how(int64_t how, const char* op) {
  STD_TORCH_CHECK(how >= 0 && how <= 2, "lwkd.ops: ", op, ": how: expected 0, 1 or 2, got ", how);
  return static_cast<How>(how);
}

inline bool same_shape(const Tensor& x, const Tensor& y) {
  bool same = x.dim() == y.dim();
  for (int64_t d = 0; same && d < x.dim(); ++d) same = x.size(d) == y.size(d);
  return same;
}

// What is given has to fit together: the kernels go by it without looking.

inline void check_row(const Tensor& x, const char* op, const char* argument, int64_t layer,
                      int64_t n) {
  const ScalarType dtype = x.scalar_type();
  const bool floating = dtype == ScalarType::Double || dtype == ScalarType::Float ||
                        dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
  STD_TORCH_CHECK(floating, "lwkd.ops: ", op, ": ", argument, " (layer ", layer,
                  "): expected float64, float32, float16 or bfloat16, got another dtype");
  STD_TORCH_CHECK(x.dim() >= 2 && x.size(0) == n, "lwkd.ops: ", op, ": ", argument, " (layer ",
                  layer, "): expected rows [", n, ", ...], got another shape");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(x.const_data_ptr()) % element_size(dtype) == 0,
                  "lwkd.ops: ", op, ": ", argument, " (layer ", layer,
                  "): expected data aligned to its elements, got a tensor that is not; pass a ",
                  "clone()");
}

inline How check_rows(const std::vector<Tensor>& student, const std::vector<Tensor>& teacher,
                      int64_t how_number) {
  const char* op = "jacobian_rows";
  const How how = read_how(how_number, op);
  const int64_t count = student.size();
  STD_TORCH_CHECK(count > 0 && teacher.size() == student.size(), "lwkd.ops: ", op,
                  ": teacher: expected ", count, " tensors, got ", teacher.size());
  const int64_t samples = student[0].dim() > 0 ? student[0].size(0) : 0;
  for (int64_t l = 0; l < count; ++l) {
    check_row(student[l], op, "student", l, samples);
    check_row(teacher[l], op, "teacher", l, samples);
    STD_TORCH_CHECK(how == kNorms || same_shape(student[l], teacher[l]), "lwkd.ops: ", op,
                    ": teacher (layer ", l, "): expected the student's shape, got another");
  }
  return how;
}

inline How check_rows_backward(const Tensor& grad, const std::vector<Tensor>& xs,
                               const std::vector<Tensor>& others, const Tensor& sums,
                               const std::vector<int64_t>& layers,
                               const std::vector<int64_t>& sides, int64_t how_number) {
  const char* op = "jacobian_rows_backward";
  const How how = read_how(how_number, op);
  const size_t count = xs.size();
  STD_TORCH_CHECK(count > 0 && layers.size() == count && sides.size() == count &&
                      others.size() == (how == kNorms ? 0 : count),
                  "lwkd.ops: ", op, ": xs: expected at least one, with a layer, a side and the ",
                  "other row each, got ", count);
  STD_TORCH_CHECK(sums.dim() == 3 && sums.size(2) == 3 && sums.is_contiguous() &&
                      sums.scalar_type() == ScalarType::Double,
                  "lwkd.ops: ", op, ": sums: expected float64 [L, N, 3], contiguous");
  const int64_t length = sums.size(0), samples = sums.size(1);
  const bool floating =
      grad.scalar_type() == ScalarType::Float || grad.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(floating && grad.dim() >= 1 && grad.dim() <= 2 && grad.size(0) == length &&
                      (grad.dim() == 1 || grad.size(1) == samples),
                  "lwkd.ops: ", op, ": grad: expected float32 or float64, [L] or [L, N]");
  for (size_t i = 0; i < count; ++i) {
    check_row(xs[i], op, "xs", i, samples);
    STD_TORCH_CHECK(layers[i] >= 0 && layers[i] < length && (sides[i] == 0 || sides[i] == 1),
                    "lwkd.ops: ", op, ": layers, sides (", i, "): out of range");
    if (how == kNorms) continue;
    check_row(others[i], op, "others", i, samples);
    STD_TORCH_CHECK(same_shape(xs[i], others[i]), "lwkd.ops: ", op, ": others (layer ", i,
                    "): expected the shape of xs, got another");
  }
  return how;
}

}  // namespace lwkd
