// Device side of the Gram matrices of ridge_cholesky: no torch, no launches, so that it compiles anywhere and runs in
// the test emulator.
#pragma once
#include <cstdint>
#include <type_traits>

#include "device.cuh"
#include "rows.cuh"

namespace timerome {

constexpr int kGramColumns = 16;  // of each row, that a warp takes at a time

// G = K K^T in float64 for up to 8 kGroups keys, d a multiple of 4: keys (batch, n, d) are read once, in their own
// type, and converted in registers. Of entry b, only the first lengths[b] rows are read, null for n; the others count
// as zero. Each of the (splits, batch) matrices (n, n) that are written is the sum over its share of the columns.
//
// The product is made by the tensor cores in tiles of 8 x 8, those of the lower triangle. In K K^T the two operands of
// a tile are alike: row g of a group of eight, column q of four, in lane 4 g + q. Which four columns are taken together
// does not matter to the sum, so lane q reads columns 4 q to 4 q + 3 of a warp's sixteen, and the j-th of all lanes go
// together.
template <class T, int kGroups>
__global__ void __launch_bounds__(kThreads, kGroups > 5 ? 1 : 2)
    gram_kernel(const void* __restrict__ keys, const int64_t* __restrict__ lengths, double* __restrict__ gram,
                int64_t batch, int n, int d, int splits) {
  constexpr int kTiles = kGroups * (kGroups + 1) / 2;
  __shared__ double whole[kTiles * 64];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int64_t steps = (d + kGramColumns - 1) / kGramColumns;
  for (int64_t item = blockIdx.x; item < splits * batch; item += gridDim.x) {
    const int64_t split = item / batch, system = item % batch;
    const int64_t length = lengths ? lengths[system] : n;
    const T* const first_row = static_cast<const T*>(keys) + (system * n + lane / 4) * d;
    const int last = int((split + 1) * steps / splits);

    Quad<T> coming[kGroups] = {};
    const auto load = [&](int step) {
#pragma unroll
      for (int group = 0; group < kGroups; group++)
        coming[group] = 8 * group + lane / 4 < length ? load_quad<true>(first_row + int64_t(8 * group) * d,
                                                                        step * kGramColumns + 4 * (lane & 3), d)
                                                      : Quad<T>{};
    };
    double sum[kTiles][2] = {};
    int step = int(split * steps / splits) + warp;
    if (step < last) load(step);
    for (; step < last; step += kWarps) {
      Quad<T> here[kGroups];
#pragma unroll
      for (int group = 0; group < kGroups; group++) here[group] = coming[group];
      if (step + kWarps < last) load(step + kWarps);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        double x[kGroups];
#pragma unroll
        for (int group = 0; group < kGroups; group++) x[group] = double(to_float(here[group].e[j]));
#pragma unroll
        for (int row = 0; row < kGroups; row++)
#pragma unroll
          for (int column = 0; column <= row; column++) mma(sum[row * (row + 1) / 2 + column], x[row], x[column]);
      }
    }

    // One warp after the other, so that the sum is the same each time.
    for (int turn = 0; turn < kWarps; turn++) {
      if (warp == turn)
#pragma unroll
        for (int tile = 0; tile < kTiles; tile++)
#pragma unroll
          for (int i = 0; i < 2; i++) {
            double& entry = whole[64 * tile + 2 * lane + i];
            entry = turn ? entry + sum[tile][i] : sum[tile][i];
          }
      __syncthreads();
    }
    for (int i = threadIdx.x; i < n * n; i += kThreads) {
      const int row = max(i / n, i % n), column = min(i / n, i % n), group = row / 8;
      gram[item * n * n + i] = whole[64 * (group * (group + 1) / 2 + column / 8) + row % 8 * 8 + column % 8];
    }
    __syncthreads();  // the next matrix takes the same shared memory
  }
}

// Calls f with the kernel for n keys, at most 64, of a dtype.
template <class F>
auto for_gram_kernel(int dtype, int64_t n, F f) {
  return for_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    if (n <= 16) return f(gram_kernel<T, 2>);
    return n <= 40 ? f(gram_kernel<T, 5>) : f(gram_kernel<T, 8>);
  });
}

}  // namespace timerome
