// Launcher of sparsify_add_kernel.cuh.
#include <algorithm>

#include "cuda_common.cuh"
#include "kernels.h"
#include "sparsify_add_kernel.cuh"

namespace timerome {
namespace {

struct Args {
  const void* h;
  const float* r;
  void* out;
  const uint8_t* mask;
  int64_t rows;
  int d, k;
  float alpha;
  cudaStream_t stream;
};

template <class T, int kPerThread, bool kAligned>
void launch(const Args& a) {
  const unsigned grid = unsigned(std::min<int64_t>(a.rows, 0x7fffffff));
  sparsify_add_kernel<T, kPerThread, kAligned><<<grid, kThreads, 0, a.stream>>>(
      static_cast<const T*>(a.h), a.r, static_cast<T*>(a.out), a.mask, a.rows, a.d, a.k, a.alpha);
}

template <class T, bool kAligned>
void launch_width(const Args& a) {
  if (a.d <= kThreads * 4) return launch<T, 4, kAligned>(a);
  if (a.d <= kThreads * 8) return launch<T, 8, kAligned>(a);
  if (a.d <= kThreads * 16) return launch<T, 16, kAligned>(a);
  return launch<T, 32, kAligned>(a);
}

template <class T>
cudaError_t launch_aligned(const Args& a) {
  const auto on = [](const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  const bool aligned = a.d % 4 == 0 && on(a.r, 16) && on(a.h, 4 * sizeof(T)) && on(a.out, 4 * sizeof(T));
  aligned ? launch_width<T, true>(a) : launch_width<T, false>(a);
  return cudaGetLastError();
}

}  // namespace

int sparsify_add_cuda(const void* h, const float* r, void* out, const uint8_t* mask, int64_t rows, int64_t d, int64_t k,
                      float alpha, int dtype, int device, void* stream) {
  if (rows == 0 || d == 0) return cudaSuccess;
  if (d > kSparsifyAddCudaMaxD) return cudaErrorInvalidValue;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  const Args args = {h, r, out, mask, rows, int(d), int(k), alpha, static_cast<cudaStream_t>(stream)};
  switch (dtype) {
    case 0:
      return launch_aligned<float>(args);
    case 1:
      return launch_aligned<__half>(args);
    case 2:
      return launch_aligned<__nv_bfloat16>(args);
  }
  return cudaErrorInvalidValue;
}

}  // namespace timerome
