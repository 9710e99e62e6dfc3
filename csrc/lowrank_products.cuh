// What the kernels of sparse_lowrank_residual for few keys share. No torch, no launches, in all of them, so that they
// compile anywhere and run in the test emulator.
//
// Two kernels. score_gate (lowrank_score.cuh) reads h and the keys and writes scores; apply_small (lowrank_apply.cuh)
// applies the gate and makes, selects (lowrank_select.cuh) and adds the residual of the rows that pass. So a row that
// does not pass costs one reading.
//
// Products run on the tensor cores, in bfloat16 with float32 sums, and are as good as float32 ones: a float32 is the
// exact sum of three bfloat16s, and all products of two parts that are large enough to count are made. The tensor
// cores' own sums are cut off rather than rounded, so they are kept to 64 columns and added up outside.
#pragma once
#include <type_traits>

#include "device.cuh"
#include "kernels.h"
#include "rows.cuh"

namespace timerome {

constexpr int kLowrankThreads = 512;
constexpr int kLowrankWarps = kLowrankThreads / 32;
// Kernels are made for so many keys, in tiles of eight, and values, in groups of sixteen: the sides of a tensor core's
// product. What a call has less is read twice, or not at all, and has no part in the result.
template <class F>
auto for_tiles(int n, F f) {
  return n <= 40 ? f(std::integral_constant<int, 5>()) : f(std::integral_constant<int, int(kLowrankCudaMaxN) / 8>());
}
template <class F>
auto for_groups(int m, F f) {
  if (m <= 16) return f(std::integral_constant<int, 1>());
  return m <= 48 ? f(std::integral_constant<int, 3>()) : f(std::integral_constant<int, int(kLowrankCudaMaxN) / 16>());
}
// Keys and values are in bfloat16 or float32, whatever rows are in.
template <class F>
auto for_matrix(int dtype, F f) {
  return dtype == 2 ? f(__nv_bfloat16()) : f(float());
}

template <class T>
constexpr int kPartsOf = sizeof(T) == 4 ? 3 : 1;  // of float and bfloat16

inline __host__ __device__ int up_to(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// Four floats as sums of bfloat16s, in pairs as the tensor cores take them.
template <int kParts>
struct Parts {
  uint32_t pair[kParts][2];
};

// The upper half of a float's bits is a bfloat16, what is left over a float again. An infinity leaves NaN over.
template <int kParts>
__device__ __forceinline__ Parts<kParts> split(Quad<float> x) {
  constexpr uint32_t kUpper = 0xffff0000u;
  Parts<kParts> parts;
#pragma unroll
  for (int p = 0; p < kParts; p++) {
#pragma unroll
    for (int i = 0; i < 2; i++)
      parts.pair[p][i] = __float_as_uint(x.e[2 * i]) >> 16 | (__float_as_uint(x.e[2 * i + 1]) & kUpper);
#pragma unroll
    for (int j = 0; j < 4; j++) x.e[j] -= __uint_as_float(__float_as_uint(x.e[j]) & kUpper);
  }
  return parts;
}

// Four entries as words: as entries of two bytes each of them would take a register.
template <class T>
struct alignas(4 * sizeof(T)) Words {
  uint32_t word[sizeof(T)];
};
__device__ __forceinline__ float2 floats_of(__half, uint32_t word) {
  return __half22float2(reinterpret_cast<const __half2&>(word));
}
__device__ __forceinline__ float2 floats_of(__nv_bfloat16, uint32_t word) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}
template <class T>
__device__ __forceinline__ Quad<float> to_floats(const Words<T>& x) {
  const float2 lower = floats_of(T(), x.word[0]), upper = floats_of(T(), x.word[1]);
  return {lower.x, lower.y, upper.x, upper.y};
}
template <>
__device__ __forceinline__ Quad<float> to_floats(const Words<float>& x) {
  return reinterpret_cast<const Quad<float>&>(x);
}

template <int kParts, class T>
__device__ __forceinline__ Parts<kParts> parts_of(const Words<T>& x) {
  return split<kParts>(to_floats(x));
}
template <>
__device__ __forceinline__ Parts<1> parts_of<1>(const Words<__nv_bfloat16>& x) {
  return {{{x.word[0], x.word[1]}}};
}

// sum (16, 8) += [lower; upper] (16, 16) other (16, 8), spread over the warp: lane 4 g + q holds the entries q of row
// g of lower and upper, four each, those of column g of other, and of the sum the entries 2 q and 2 q + 1 of row g,
// then of row g + 8. Which four of the 16 inner entries a lane holds does not matter, if it is the same for all.
template <int kLeft, int kRight>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const Parts<kLeft>& lower, const Parts<kLeft>& upper,
                                             const Parts<kRight>& other) {
#pragma unroll
  for (int order = 2; order >= 0; order--)  // the small ones first; those beyond are below a float's last bit
#pragma unroll
    for (int p = 0; p < kLeft; p++) {
      const int o = order - p;
      if (o >= 0 && o < kRight)
        mma(sum, {lower.pair[p][0], upper.pair[p][0], lower.pair[p][1], upper.pair[p][1]},
            {other.pair[o][0], other.pair[o][1]});
    }
}

}  // namespace timerome
