// The CUDA kernel of sparsify_add, run by the emulator; called from tests/ops/test_cuda_kernels.py.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "emulator.h"
#include "sparsify_add_kernel.cuh"

extern "C" int emulated_sparsify_add(int dtype, int aligned, const void* h, const float* r, void* out,
                                     const uint8_t* mask, int64_t rows, int d, int k, float alpha, int blocks) {
  try {
    timerome::for_sparsify_add_kernel(dtype, d, aligned, [&](auto kernel) {
      emulator::launch(blocks, timerome::kThreads, 0, [=] { kernel(h, r, out, mask, rows, d, k, alpha); });
    });
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}
