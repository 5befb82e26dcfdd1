// What the two forms of the Jacobian kind, rows and factors, have in common.
#pragma once

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

}  // namespace lwkd
