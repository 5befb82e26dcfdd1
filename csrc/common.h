// The only file that knows the ABI: torch's stable headers, the tensor alias, the dtype switch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <type_traits>

namespace lwkd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// TORCH_BOX silently passes 0 to a C++ float: kernels take double, int64_t and bool only.
template <typename... Args>
constexpr bool takes_float(void (*)(Args...)) {
  return (std::is_same_v<std::remove_cvref_t<Args>, float> || ...);
}
template <typename Return, typename... Args>
constexpr bool takes_float(Return (*)(Args...)) {
  return (std::is_same_v<std::remove_cvref_t<Args>, float> || ...);
}
#define LWKD_BOX(function)                                                               \
  ([] {                                                                                  \
    static_assert(!::lwkd::takes_float(function), "use double, TORCH_BOX drops floats"); \
    return TORCH_BOX(function);                                                          \
  }())

}  // namespace lwkd
