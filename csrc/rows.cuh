// What kernels that work on rows share: types, four entries at a time, a sum over a warp.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace timerome {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16(x);
}

inline bool is_dtype(int code) { return code >= 0 && code <= 2; }
// Calls f with a value of the type that a dtype code stands for: float32, float16, bfloat16 (kernels.h).
template <class F>
auto for_dtype(int dtype, F f) {
  if (dtype == 0) return f(float());
  return dtype == 1 ? f(__half()) : f(__nv_bfloat16());
}

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// x + alpha * r in two roundings, as in PyTorch, not one fused multiply-add; then one to the type of x.
template <class T>
__device__ __forceinline__ T add_scaled(T x, float alpha, float r) {
  return from_float<T>(__fadd_rn(to_float(x), __fmul_rn(alpha, r)));
}

// Sum over the lanes of a warp up to this one.
__device__ __forceinline__ uint32_t warp_inclusive_scan(uint32_t sum) {
#pragma unroll
  for (int offset = 1; offset < 32; offset <<= 1) {
    const uint32_t other = __shfl_up_sync(~0u, sum, offset);
    if (int(threadIdx.x & 31) >= offset) sum += other;
  }
  return sum;
}

// Sum over four neighbouring lanes; all of them get it.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

template <class T>
struct alignas(4 * sizeof(T)) Quad {
  T e[4];
};

// Four neighbours from column c on; past the end of the row they read as zero and are not written. kAligned promises
// that d is a multiple of 4 and that rows start on a boundary of a whole quad.
template <bool kAligned, class T>
__device__ __forceinline__ Quad<T> load_quad(const T* row, int c, int d) {
  Quad<T> quad = {};
  if (kAligned) {
    if (c < d) quad = *reinterpret_cast<const Quad<T>*>(row + c);
  } else {
#pragma unroll
    for (int j = 0; j < 4; j++)
      if (c + j < d) quad.e[j] = row[c + j];
  }
  return quad;
}
template <bool kAligned, class T>
__device__ __forceinline__ void store_quad(T* row, int c, int d, const Quad<T>& quad) {
  if (kAligned) {
    if (c < d) *reinterpret_cast<Quad<T>*>(row + c) = quad;
  } else {
#pragma unroll
    for (int j = 0; j < 4; j++)
      if (c + j < d) row[c + j] = quad.e[j];
  }
}

}  // namespace timerome
