// Device side of sparsify_add: no torch, no launches, so that it compiles anywhere and runs in the test emulator.
#pragma once
#include <type_traits>

#include "rows.cuh"

namespace timerome {

// Sum over all threads before this one, and over all. Every thread of the block must call it.
__device__ __forceinline__ uint32_t exclusive_scan(uint32_t value, uint32_t* warp_sum, uint32_t* total) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const uint32_t inclusive = warp_inclusive_scan(value);
  if (lane == 31) warp_sum[warp] = inclusive;
  __syncthreads();
  uint32_t before = 0, all = 0;
#pragma unroll
  for (int i = 0; i < kWarps; i++) {
    if (i < warp) before += warp_sum[i];
    all += warp_sum[i];
  }
  __syncthreads();  // warp_sum may be reused at once
  *total = all;
  return before + inclusive - value;
}

struct Pick {
  uint32_t bin;    // the bin that holds the need-th largest value
  uint32_t need;   // how many of that bin are wanted
  uint32_t count;  // how many that bin holds
};

// Walks the histogram from its last bin down. Every thread of the block must call it.
template <int kBins>
__device__ Pick pick_bin(const uint32_t* histogram, uint32_t need, uint32_t* warp_sum, Pick* shared) {
  constexpr int kPer = kBins / kThreads;  // bins of one thread; thread 0 owns the highest
  uint32_t count[kPer], sum = 0, total;
#pragma unroll
  for (int i = 0; i < kPer; i++) sum += count[i] = histogram[kBins - 1 - (int(threadIdx.x) * kPer + i)];
  uint32_t above = exclusive_scan(sum, warp_sum, &total);
  if (above < need && above + sum >= need) {
#pragma unroll
    for (int i = 0; i < kPer; i++) {
      if (above < need && above + count[i] >= need)
        *shared = {uint32_t(kBins - 1 - (int(threadIdx.x) * kPer + i)), need - above, count[i]};
      above += count[i];
    }
  }
  __syncthreads();
  const Pick pick = *shared;
  __syncthreads();
  return pick;
}

// out[t, :] = h[t, :] + alpha * r[t, :] on the k largest |r[t, :]| (ties: lowest index first), h[t, :] elsewhere.
// One block a row, the row of r in registers: thread x holds the quads x, x + 256, ... . A radix selection over the
// magnitude's bits, 11 + 10 + 10 of them, finds the threshold exactly; every NaN is above infinity. h and out may be
// the same memory, hence no __restrict__ on them.
template <class T, int kPerThread, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    sparsify_add_kernel(const void* h, const float* __restrict__ r, void* out, const uint8_t* __restrict__ mask,
                        int64_t rows, int d, int k, float alpha) {
  constexpr int kQuads = kPerThread / 4;
  static_assert(kPerThread <= 32, "the kept entries of a thread are one 32-bit word");
  __shared__ uint32_t histogram[2048];
  __shared__ uint32_t warp_sum[kWarps];
  __shared__ Pick shared_pick;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T* h_row = static_cast<const T*>(h) + row * d;
    T* out_row = static_cast<T*>(out) + row * d;
    if (k == 0 || (mask && !mask[row])) {
      if (out_row != h_row)
        for (int c = threadIdx.x; c < d; c += kThreads) out_row[c] = h_row[c];
      continue;
    }
    Quad<float> value[kQuads];
    uint32_t inside = 0;  // bit 4q+j: entry j of quad q is a column of the row, not padding
#pragma unroll
    for (int q = 0; q < kQuads; q++) {
      const int c = (q * kThreads + int(threadIdx.x)) * 4;
      value[q] = load_quad<kAligned>(r + row * d, c, d);
#pragma unroll
      for (int j = 0; j < 4; j++) inside |= uint32_t(c + j < d) << (4 * q + j);
    }
    uint32_t keep = inside;
    if (k < d) {
      Pick pick = {0, uint32_t(k), 0};
      uint32_t threshold = 0;
#pragma unroll
      for (int pass = 0; pass < 3; pass++) {
        const int shift = pass == 0 ? 20 : pass == 1 ? 10 : 0;
        const uint32_t bits = pass == 0 ? 2047 : 1023;
        for (int i = threadIdx.x; i < 2048; i += kThreads) histogram[i] = 0;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kPerThread; i++) {
          const uint32_t magnitude = __float_as_uint(value[i / 4].e[i % 4]) & 0x7fffffffu;
          if ((inside >> i & 1) && (pass == 0 || magnitude >> (shift + 10) == threshold))
            atomicAdd(&histogram[magnitude >> shift & bits], 1u);
        }
        __syncthreads();
        pick = pass == 0 ? pick_bin<2048>(histogram, pick.need, warp_sum, &shared_pick)
                         : pick_bin<1024>(histogram, pick.need, warp_sum, &shared_pick);
        threshold = pass == 0 ? pick.bin : threshold << 10 | pick.bin;
      }
      uint32_t tied = 0;
      keep = 0;
#pragma unroll
      for (int i = 0; i < kPerThread; i++) {
        const uint32_t magnitude = __float_as_uint(value[i / 4].e[i % 4]) & 0x7fffffffu;
        keep |= uint32_t(magnitude > threshold) << i;
        tied |= uint32_t(magnitude == threshold) << i;
      }
      // More ties than places: number them in column order. Every thread takes the same branch. Padding may count as
      // tied with zero; being last, it takes no place from a column.
      if (pick.need < pick.count) {
        uint32_t seen = 0;
#pragma unroll
        for (int q = 0; q < kQuads; q++) {
          uint32_t total;
          uint32_t rank = seen + exclusive_scan(__popc(tied >> (4 * q) & 15u), warp_sum, &total);
#pragma unroll
          for (int j = 0; j < 4; j++) {
            const uint32_t bit = 1u << (4 * q + j);
            if ((tied & bit) && rank++ >= pick.need) tied &= ~bit;
          }
          seen += total;
        }
      }
      keep |= tied;
    }
#pragma unroll
    for (int q = 0; q < kQuads; q++) {
      const int c = (q * kThreads + int(threadIdx.x)) * 4;
      Quad<T> x = load_quad<kAligned>(h_row, c, d);
#pragma unroll
      for (int j = 0; j < 4; j++)
        if (keep >> (4 * q + j) & 1) x.e[j] = add_scaled(x.e[j], alpha, value[q].e[j]);
      store_quad<kAligned>(out_row, c, d, x);
    }
  }
}

// Calls f with the kernel for rows of d columns, at most 8192, of a dtype; `aligned` is what kAligned promises.
template <class F>
auto for_sparsify_add_kernel(int dtype, int64_t d, bool aligned, F f) {
  const auto for_width = [&](auto type, auto wide) {
    using T = decltype(type);
    constexpr bool kAligned = decltype(wide)::value;
    if (d <= kThreads * 4) return f(sparsify_add_kernel<T, 4, kAligned>);
    if (d <= kThreads * 8) return f(sparsify_add_kernel<T, 8, kAligned>);
    if (d <= kThreads * 16) return f(sparsify_add_kernel<T, 16, kAligned>);
    return f(sparsify_add_kernel<T, 32, kAligned>);
  };
  return for_dtype(dtype, [&](auto type) {
    return aligned ? for_width(type, std::true_type()) : for_width(type, std::false_type());
  });
}

}  // namespace timerome
