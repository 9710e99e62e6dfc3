// The CUDA kernel of Gram matrices, run by the emulator; called from tests/ops/test_cuda_kernels.py.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "emulator.h"
#include "gram_kernel.cuh"

extern "C" int emulated_gram(const void* keys, const int64_t* lengths, double* gram, int64_t batch, int64_t n,
                             int64_t d, int64_t splits, int dtype, int blocks) {
  try {
    timerome::for_gram_kernel(dtype, n, [&](auto kernel) {
      emulator::launch(blocks, timerome::kThreads, 0,
                       [=] { kernel(keys, lengths, gram, batch, int(n), int(d), int(splits)); });
    });
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}
