// Launcher of gram_kernel.cuh.
#include <algorithm>

#include "cuda_common.cuh"
#include "gram_kernel.cuh"
#include "kernels.h"

namespace timerome {

int gram_cuda_splits(int64_t batch, int64_t d, int device, int64_t* splits) {
  int processors = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  // Two blocks a multiprocessor, and two steps a warp at least.
  const int64_t enough = 2 * processors / std::max<int64_t>(batch, 1), most = d / (2 * kWarps * kGramColumns);
  *splits = std::max<int64_t>(1, std::min(enough, most));
  return error;
}

int gram_cuda(const void* keys, const int64_t* lengths, double* gram, int64_t batch, int64_t n, int64_t d,
              int64_t splits, int dtype, int device, void* stream) {
  if (batch == 0 || n == 0) return cudaSuccess;
  if (n > kGramCudaMaxN || d % 4 || !is_dtype(dtype)) return cudaErrorInvalidValue;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  const unsigned grid = unsigned(std::min<int64_t>(splits * batch, 0x7fffffff));
  for_gram_kernel(dtype, n, [&](auto kernel) {
    kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(keys, lengths, gram, batch, int(n), int(d),
                                                                      int(splits));
  });
  return cudaGetLastError();
}

}  // namespace timerome
