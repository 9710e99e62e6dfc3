// The CUDA kernel of sparsify_add, run by the emulator; called from tests/ops/test_cuda_kernels.py.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "emulator.h"
#include "sparsify_add_kernel.cuh"

template <class T, int kPerThread>
static void run(bool aligned, const void* h, const float* r, void* out, const uint8_t* mask, int64_t rows, int d, int k,
                float alpha, int blocks) {
  emulator::launch(blocks, timerome::kThreads, 0, [=] {
    const T* in = static_cast<const T*>(h);
    T* to = static_cast<T*>(out);
    if (aligned)
      timerome::sparsify_add_kernel<T, kPerThread, true>(in, r, to, mask, rows, d, k, alpha);
    else
      timerome::sparsify_add_kernel<T, kPerThread, false>(in, r, to, mask, rows, d, k, alpha);
  });
}

template <class T>
static void run_width(bool aligned, const void* h, const float* r, void* out, const uint8_t* mask, int64_t rows, int d,
                      int k, float alpha, int blocks) {
  if (d <= timerome::kThreads * 4) return run<T, 4>(aligned, h, r, out, mask, rows, d, k, alpha, blocks);
  run<T, 32>(aligned, h, r, out, mask, rows, d, k, alpha, blocks);
}

extern "C" int emulated_sparsify_add(int dtype, int aligned, const void* h, const float* r, void* out,
                                     const uint8_t* mask, int64_t rows, int d, int k, float alpha, int blocks) {
  try {
    if (dtype == 0) run_width<float>(aligned, h, r, out, mask, rows, d, k, alpha, blocks);
    if (dtype == 1) run_width<__half>(aligned, h, r, out, mask, rows, d, k, alpha, blocks);
    if (dtype == 2) run_width<__nv_bfloat16>(aligned, h, r, out, mask, rows, d, k, alpha, blocks);
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}
