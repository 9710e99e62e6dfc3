// Device side of ridge_cholesky: no torch, no launches, so that it compiles anywhere and runs in the test emulator.
#pragma once
#include <float.h>
#include <math.h>

#include <cstdint>

#include "device.cuh"

namespace timerome {

constexpr int kRidgeThreads = 256;

// Shared memory of a block: the lower triangle of its system, row after row, and three vectors.
constexpr int64_t ridge_shared_bytes(int64_t n) { return (n * (n + 1) / 2 + 3 * n) * int64_t(sizeof(double)); }

// Factors and inverts the lower triangles of G + rho I, one block of threads a system, in float64. System s belongs to
// gram s % batch, so that several ridges share one. What is written, and when info is not 0, is said in
// timerome/ops/ridge_cholesky.py.
//
// With G + rho I = M P M^T, M unit lower triangular and P the pivots, L = M sqrt(P) and the inverse is M^-T P^-1 M^-1.
// Step j subtracts multiples of row j from those below it, which eliminates column j; the same operations applied to I
// make M^-1, whose entries take the place of those eliminated. `line` is row j for that step: of M^-1 before column j,
// of what is left of the system from there on. Each step writes the line of the next, so one barrier a step is enough.
__global__ void __launch_bounds__(kRidgeThreads)
    ridge_kernel(const double* __restrict__ gram, const double* __restrict__ ridge, const int64_t* __restrict__ lengths,
                 double* __restrict__ inverse, double* __restrict__ cholesky, int* __restrict__ info, int64_t systems,
                 int64_t batch, int n) {
  constexpr int kWarps = kRidgeThreads / 32;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  double* const triangle = dynamic_shared<double>();
  const auto row = [&](int r) { return triangle + r * (r + 1) / 2; };
  double *lost = row(n), *line = lost + n, *next = line + n;
  for (int64_t s = blockIdx.x; s < systems; s += gridDim.x) {
    const int64_t square = int64_t(n) * n;
    const double* g = gram + s % batch * square;
    double *A = inverse + s * square, *L = cholesky + s * square;
    const int64_t length = lengths ? lengths[s % batch] : n;
    const int size = length < 0 ? 0 : length < n ? int(length) : n;
    const double rho = ridge[s];

    bool finite = isfinite(rho);
    for (int r = warp; r < size; r += kWarps)
      for (int c = lane; c <= r; c += 32) {
        const double x = g[r * n + c] + (c == r ? rho : 0.0);
        finite = finite && isfinite(x);
        row(r)[c] = x;
        if (c == 0) line[r] = x;
        if (c == r) lost[r] = n * DBL_EPSILON * x;  // a pivot up to here would be all rounding error
      }
    int failed = __syncthreads_or(!finite) ? -1 : 0;

    for (int j = 0; j < size && !failed; j++) {  // every thread sees the same pivot
      const double pivot = line[j], root = sqrt(pivot);
      if (!(pivot > lost[j])) {
        failed = j + 1;
        break;
      }
      for (int r = j + int(threadIdx.x); r < size; r += kRidgeThreads) L[r * n + j] = r == j ? root : line[r] / root;
      for (int r = j + 1 + warp; r < size; r += kWarps) {
        const double multiple = line[r] / pivot;
        for (int c = lane; c <= r; c += 32) {
          const double x = c == j ? -multiple : row(r)[c] - multiple * line[c];
          row(r)[c] = x;
          if (r == j + 1)
            next[c] = x;
          else if (c == j + 1)
            next[r] = x;
        }
      }
      __syncthreads();
      double* const used = line;
      line = next;
      next = used;
    }

    double* const weight = lost;
    if (!failed)
      for (int i = threadIdx.x; i < size; i += kRidgeThreads) weight[i] = 1.0 / row(i)[i];
    __syncthreads();
    const double fill = failed ? nan("") : 0.0;
    for (int r = warp; r < n; r += kWarps)
      for (int c = lane; c < n; c += 32) {
        if (failed || r >= size || c > r) L[r * n + c] = fill;
        if (failed || r >= size || c >= size) {
          A[r * n + c] = fill;
        } else if (c <= r) {
          double sum = (c == r ? 1.0 : row(r)[c]) * weight[r];
          for (int k = r + 1; k < size; k++) sum += row(k)[r] * row(k)[c] * weight[k];
          A[r * n + c] = A[c * n + r] = sum;
        }
      }
    if (threadIdx.x == 0) info[s] = failed;
    __syncthreads();  // the next system takes the same shared memory
  }
}

}  // namespace timerome
