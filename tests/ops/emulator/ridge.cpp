// The CUDA kernel of ridge_cholesky, run by the emulator; called from tests/ops/test_cuda_kernels.py.
#include <cuda_runtime.h>

#include "emulator.h"
#include "ridge_kernel.cuh"

extern "C" int emulated_ridge(const double* gram, const double* ridge, const int64_t* lengths, double* inverse,
                              double* cholesky, int* info, int64_t systems, int64_t batch, int64_t n, int blocks) {
  try {
    emulator::launch(blocks, timerome::kRidgeThreads, timerome::ridge_shared_bytes(n), [=] {
      timerome::ridge_kernel(gram, ridge, lengths, inverse, cholesky, info, systems, batch, int(n));
    });
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}
