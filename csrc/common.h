// The only file that knows the ABI: torch's stable headers, the tensor alias, the dtype switch.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

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

inline int64_t element_size(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

// Whether the elements fill their memory without gaps and without overlap, in any order.
inline bool is_dense(const Tensor& x) {
  int64_t expected = 1;
  for (int64_t left = x.numel(); left > 1;) {
    int64_t at = 0;
    while (at < x.dim() && (x.size(at) == 1 || x.stride(at) != expected)) ++at;
    if (at == x.dim()) return false;
    expected *= x.size(at);
    left /= x.size(at);
  }
  return x.numel() > 0;
}

// Asks for large pages under a large fresh tensor: in pages of 4 KiB, the kernel's handing them out
// takes several times as long as writing them does.
inline void advise(const Tensor& x, int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t kLarge = 4 << 20, kPage = 4096;
  if (bytes < kLarge) return;
  const auto data = reinterpret_cast<uintptr_t>(x.mutable_data_ptr());
  const uintptr_t begin = (data + kPage - 1) / kPage * kPage, end = (data + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: may be refused
#endif
}

// A fresh tensor, laid out as torch.empty_like does it. By name, through the dispatcher, it would
// cost more than a small layer.
inline Tensor fresh_like(const Tensor& x) {
  if (!is_dense(x)) return torch::stable::empty_like(x);
  int32_t dtype = 0, type = 0, index = 0;
  AtenTensorHandle out = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &index));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(x.dim(), x.sizes().data(), x.strides().data(),
                                                  dtype, type, index, &out));
  Tensor fresh(out);
  if (type == aoti_torch_device_type_cpu())
    advise(fresh, x.numel() * element_size(x.scalar_type()));
  return fresh;
}

}  // namespace lwkd
