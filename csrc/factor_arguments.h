// What the op jacobian_factors is given has to fit together: the kernels go by it without looking.
#pragma once

#include <algorithm>
#include <vector>

#include "jacobian.h"
#include "operand.h"

namespace lwkd {

enum Form { kDense, kIndices, kConvolution };  // lwkd/ops/factors_reference.py
constexpr int64_t kSquares = 3;                // of how
constexpr int64_t kForm = 15;  // form, groups, transposed, and four numbers for three dimensions

inline void check_factor(const Tensor& a, const Tensor& d, const int64_t* form,
                         const char* argument, int64_t i, int64_t samples) {
  const char* op = "lwkd.ops: jacobian_factors: ";
  const auto floating = [](const Tensor& x) {
    const ScalarType t = x.scalar_type();
    return t == ScalarType::Double || t == ScalarType::Float || t == ScalarType::Half ||
           t == ScalarType::BFloat16;
  };
  const auto aligned = [](const Tensor& x, int64_t size) {
    return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % size == 0;
  };
  const bool indices = form[0] == kIndices;
  STD_TORCH_CHECK(form[0] >= 0 && form[0] <= kConvolution, op, "forms (item ", i,
                  "): expected a form 0, 1 or 2, got ", form[0]);
  STD_TORCH_CHECK(floating(d) && (indices ? a.scalar_type() == ScalarType::Long : floating(a)), op,
                  argument, " (item ", i,
                  "): expected float64, float32, float16 or bfloat16, or int64 indices");
  STD_TORCH_CHECK(aligned(d, element_size(d.scalar_type())) &&
                      aligned(a, indices ? 8 : element_size(a.scalar_type())),
                  op, argument, " (item ", i, "): expected data aligned to its elements; pass a ",
                  "clone()");
  bool fits = a.dim() >= 2 && d.dim() >= 3 && a.size(0) == samples && d.size(0) == samples;
  if (form[0] == kConvolution) {
    fits = fits && a.dim() >= 3 && a.dim() <= 5 && d.dim() == a.dim() && form[1] >= 1 &&
           a.size(1) % form[1] == 0 && d.size(1) % form[1] == 0;
    for (int64_t k = 0; fits && k < a.dim() - 2; ++k) {
      const int64_t* at = form + 3 + (3 - (a.dim() - 2)) + k;  // kernel, stride, padding, dilation
      const Tensor &x = form[2] ? d : a, &y = form[2] ? a : d;
      fits = at[0] >= 1 && at[3] >= 1 && at[6] >= 0 && at[9] >= 1;
      const int64_t room = fits ? x.size(2 + k) + 2 * at[6] - at[9] * (at[0] - 1) - 1 : -1;
      fits = fits && room >= 0 && y.size(2 + k) <= room / at[3] + 1;
    }
  } else {
    const int64_t dim = indices ? 3 : a.dim();
    fits = fits && d.dim() == dim && dim <= 4 && a.dim() == (indices ? 2 : dim);
    for (int64_t k = 1; fits && k < dim - 1; ++k) fits = a.size(k) == d.size(k);
  }
  STD_TORCH_CHECK(fits, op, argument, " (item ", i, "): expected factors of one gradient of ",
                  samples, " samples, got other shapes");
}

// Every argument of the op, but for `mean`.
struct FactorLists {
  std::vector<Tensor> a[2], d[2];  // student's and teacher's
  std::vector<int64_t> layers, forms, contractions;
  How how = kDifference;
  bool squares = false;  // ‖G_S‖² is wanted, and nothing is read of the teacher
  int64_t samples = 0;

  const int64_t* form(size_t item, int side) const { return &forms[(2 * item + side) * kForm]; }
  int64_t length() const { return layers.back() + 1; }
  bool wide() const {
    return any_double(a[0]) || any_double(a[1]) || any_double(d[0]) || any_double(d[1]);
  }

  void check(int64_t how_number) {
    const char* op = "lwkd.ops: jacobian_factors: ";
    const size_t count = a[0].size();
    STD_TORCH_CHECK(count > 0 && d[0].size() == count && a[1].size() == count &&
                        d[1].size() == count && layers.size() == count &&
                        contractions.size() == count && forms.size() == 2 * kForm * count,
                    op, "teacher: expected ", count,
                    " items, as of student, each with a layer, two forms and a contraction");
    squares = how_number == kSquares;
    how = squares ? kNorms : read_how(how_number, "jacobian_factors");
    samples = d[0][0].dim() > 0 ? d[0][0].size(0) : 0;
    for (size_t i = 0; i < count; ++i) {
      STD_TORCH_CHECK(layers[i] >= 0 &&
                          (i == 0 ? layers[i] == 0 : layers[i] - layers[i - 1] <= 1) &&
                          (i == 0 || layers[i] >= layers[i - 1]),
                      op, "layers (item ", i, "): expected 0, and then the same or the next");
      for (int side = 0; side < 2; ++side)
        check_factor(a[side][i], d[side][i], form(i, side), side ? "teacher" : "student", i,
                     samples);
      STD_TORCH_CHECK(
          how == kNorms || (std::equal(form(i, 0), form(i, 0) + kForm, form(i, 1)) &&
                            same_shape(a[0][i], a[1][i]) && same_shape(d[0][i], d[1][i])),
          op, "teacher (item ", i, "): expected the student's shapes, got others");
    }
  }
};

}  // namespace lwkd
