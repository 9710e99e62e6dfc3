// Launcher of sparsify_add_kernel.cuh.
#include <algorithm>

#include "cuda_common.cuh"
#include "kernels.h"
#include "sparsify_add_kernel.cuh"

namespace timerome {

int sparsify_add_cuda(const void* h, const float* r, void* out, const uint8_t* mask, int64_t rows, int64_t d, int64_t k,
                      float alpha, int dtype, int device, void* stream) {
  if (rows == 0 || d == 0) return cudaSuccess;
  if (d > kSparsifyAddCudaMaxD || !is_dtype(dtype)) return cudaErrorInvalidValue;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  const auto on = [](const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  const size_t quad = dtype == 0 ? 16 : 8;
  const bool aligned = d % 4 == 0 && on(r, 16) && on(h, quad) && on(out, quad);
  const unsigned grid = unsigned(std::min<int64_t>(rows, 0x7fffffff));
  for_sparsify_add_kernel(dtype, d, aligned, [&](auto kernel) {
    kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(h, r, out, mask, rows, int(d), int(k), alpha);
  });
  return cudaGetLastError();
}

}  // namespace timerome
