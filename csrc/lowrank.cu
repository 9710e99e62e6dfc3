// Launcher of lowrank_kernel.cuh.
#include <algorithm>

#include "cuda_common.cuh"
#include "kernels.h"
#include "lowrank_kernel.cuh"

namespace timerome {
namespace {

// One block for each group of rows, or as many as there may be.
unsigned blocks(int64_t rows, int each, int64_t most) { return unsigned(std::min((rows + each - 1) / each, most)); }

template <int kTiles, class Row, int kRowParts, class Key>
cudaError_t launch_score(const LowrankCuda& a, int limit, cudaStream_t stream) {
  constexpr int kWarps = kScoreWarps<kTiles>;
  const auto kernel = score_gate_kernel<kTiles, Row, kRowParts, Key>;
  const cudaError_t error = allow_shared(kernel, limit);
  if (error != cudaSuccess) return error;
  const auto bytes = size_t(score_gate_shared_bytes(int(a.n), kWarps));
  kernel<<<blocks(a.rows, kScoreRows, 0x7fffffff), 32 * kWarps, bytes, stream>>>(a);
  return cudaGetLastError();
}

template <int kTiles, class Key>
cudaError_t launch_score(const LowrankCuda& a, int limit, cudaStream_t stream) {
  if (a.dtype == 0) return launch_score<kTiles, float, 3, Key>(a, limit, stream);
  if (a.dtype == 1) return launch_score<kTiles, __half, 3, Key>(a, limit, stream);
  return a.mean ? launch_score<kTiles, __nv_bfloat16, 3, Key>(a, limit, stream)
                : launch_score<kTiles, __nv_bfloat16, 1, Key>(a, limit, stream);
}

template <class Key>
cudaError_t launch_score(const LowrankCuda& a, int limit, cudaStream_t stream) {
  return a.n <= 64 ? launch_score<8, Key>(a, limit, stream) : launch_score<16, Key>(a, limit, stream);
}

// As many blocks as there are multiprocessors: how many rows passed is known on the device only.
template <class Value>
cudaError_t launch_apply(const LowrankCuda& a, int limit, int processors, cudaStream_t stream) {
  const auto kernel = apply_small_kernel<Value>;
  const cudaError_t error = allow_shared(kernel, limit);
  if (error != cudaSuccess) return error;
  const auto bytes = size_t(apply_small_shared_bytes(int(a.d)));
  kernel<<<blocks(a.rows, kApplyRows, processors), 32 * kApplyWarps, bytes, stream>>>(a);
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
  error = a.keys_dtype == 2 ? launch_score<__nv_bfloat16>(a, limit, stream) : launch_score<float>(a, limit, stream);
  if (error != cudaSuccess) return error;
  return a.values_dtype == 2 ? launch_apply<__nv_bfloat16>(a, limit, processors, stream)
                             : launch_apply<float>(a, limit, processors, stream);
}

}  // namespace timerome
