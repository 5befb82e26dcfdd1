// Where torch meets the kernels: the device, its current stream, scratch memory, checked launches.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <optional>

#include "../common.h"
#include "common.cuh"

namespace lwkd::cuda {

inline int32_t dtype_of(ScalarType dtype) {
  if (dtype == ScalarType::Double) return kDouble;
  if (dtype == ScalarType::Half) return kHalf;
  if (dtype == ScalarType::BFloat16) return kBFloat16;
  STD_TORCH_CHECK(dtype == ScalarType::Float, "lwkd: no kernel for this dtype");
  return kFloat;
}

// Launches on the current stream of `like`'s device; scratch lives as long as the launcher, and
// torch's allocator hands it to later work of the same stream alone.
class Launcher {
 public:
  explicit Launcher(const Tensor& like) : like_(like), guard_(like.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  void* allocate(int64_t bytes) {
    scratch_ = torch::stable::new_empty(like_, {bytes}, ScalarType::Byte);
    return scratch_->mutable_data_ptr();
  }

  void clear(void* data, int64_t bytes) {
    if (bytes > 0) STD_CUDA_CHECK(cudaMemsetAsync(data, 0, bytes, stream_));
  }

  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared,
              const Arguments&... arguments) {
    STD_TORCH_CHECK(blocks <= INT32_MAX, "lwkd: a launch of ", blocks, " blocks is too large");
    kernel<<<static_cast<unsigned>(blocks), threads, shared, stream_>>>(arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  Tensor like_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  std::optional<Tensor> scratch_;
};

}  // namespace lwkd::cuda
