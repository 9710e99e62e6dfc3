// Launcher of ridge_kernel.cuh.
#include <algorithm>

#include "cuda_common.cuh"
#include "kernels.h"
#include "ridge_kernel.cuh"

namespace timerome {

int ridge_cuda_max_n(int device, int64_t* n) {
  int bytes = 0;
  const cudaError_t error = shared_limit(device, &bytes);
  for (*n = 0; ridge_shared_bytes(*n + 1) <= bytes;) ++*n;
  return error;
}

int ridge_cuda(const double* gram, const double* ridge, const int64_t* lengths, double* inverse, double* cholesky,
               int* info, int64_t systems, int64_t batch, int64_t n, int device, void* stream) {
  if (systems == 0 || n == 0) return cudaSuccess;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  int limit = 0;
  cudaError_t error = shared_limit(device, &limit);
  if (error != cudaSuccess) return error;
  if (ridge_shared_bytes(n) > limit) return cudaErrorInvalidValue;
  error = allow_shared(ridge_kernel, limit);
  if (error != cudaSuccess) return error;
  const unsigned grid = unsigned(std::min<int64_t>(systems, 0x7fffffff));
  ridge_kernel<<<grid, kRidgeThreads, size_t(ridge_shared_bytes(n)), static_cast<cudaStream_t>(stream)>>>(
      gram, ridge, lengths, inverse, cholesky, info, systems, batch, int(n));
  return cudaGetLastError();
}

}  // namespace timerome
