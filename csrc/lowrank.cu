// Launcher of lowrank_kernel.cuh.
#include <algorithm>

#include "cuda_common.cuh"
#include "kernels.h"
#include "lowrank_kernel.cuh"

namespace timerome {
namespace {

// One block for each group of rows, or as many as there may be.
unsigned blocks(int64_t rows, int each, int64_t most) { return unsigned(std::min((rows + each - 1) / each, most)); }

template <int kTiles, int kRowParts, class Key>
cudaError_t launch_score(const LowrankCuda& a, int limit, cudaStream_t stream) {
  const auto kernel = score_gate_kernel<kTiles, kRowParts, Key>;
  const cudaError_t error = allow_shared(kernel, limit);
  if (error != cudaSuccess) return error;
  kernel<<<blocks(a.rows, kScoreRows, 0x7fffffff), kThreads, size_t(score_gate_shared_bytes(int(a.n))), stream>>>(a);
  return cudaGetLastError();
}

template <int kTiles>
cudaError_t launch_score(const LowrankCuda& a, int limit, cudaStream_t stream) {
  const bool exact = a.dtype == 2 && !a.mean;  // the rows are bfloat16 as they are
  if (a.keys_dtype == 2)
    return exact ? launch_score<kTiles, 1, __nv_bfloat16>(a, limit, stream)
                 : launch_score<kTiles, 3, __nv_bfloat16>(a, limit, stream);
  return exact ? launch_score<kTiles, 1, float>(a, limit, stream) : launch_score<kTiles, 3, float>(a, limit, stream);
}

// As many blocks as there are multiprocessors: how many rows passed is known on the device only.
template <class Value>
cudaError_t launch_apply(const LowrankCuda& a, int limit, int processors, cudaStream_t stream) {
  const auto kernel = apply_small_kernel<Value>;
  const cudaError_t error = allow_shared(kernel, limit);
  if (error != cudaSuccess) return error;
  kernel<<<blocks(a.rows, kApplyRows, processors), kThreads, size_t(apply_small_shared_bytes(int(a.d))), stream>>>(a);
  return cudaGetLastError();
}

}  // namespace

int lowrank_cuda_max_d(int device, int64_t* d) {
  int bytes = 0;
  const cudaError_t error = shared_limit(device, &bytes);
  for (*d = 0; apply_small_shared_bytes(int(*d) + 16) <= bytes;) *d += 16;
  return error;
}

int lowrank_cuda(const LowrankCuda& a, int device, void* stream_) {
  if (a.rows == 0) return cudaSuccess;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  const auto stream = static_cast<cudaStream_t>(stream_);
  int limit = 0, processors = 0;
  cudaError_t error = shared_limit(device, &limit);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  if (a.n > kLowrankCudaMaxN || a.d % 4 || apply_small_shared_bytes(int(a.d)) > limit) return cudaErrorInvalidValue;
  error = a.n <= 64 ? launch_score<8>(a, limit, stream) : launch_score<16>(a, limit, stream);
  if (error != cudaSuccess) return error;
  return a.values_dtype == 2 ? launch_apply<__nv_bfloat16>(a, limit, processors, stream)
                             : launch_apply<float>(a, limit, processors, stream);
}

}  // namespace timerome
