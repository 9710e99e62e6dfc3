// The CUDA kernel of Gram matrices, run by the emulator; called from tests/ops/test_cuda_kernels.py.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "emulator.h"
#include "gram_kernel.cuh"

template <class T>
static void run(const void* keys, const int64_t* lengths, double* gram, int64_t batch, int64_t n, int64_t d,
                int64_t splits, int blocks) {
  timerome::for_gram_groups(n, [=](auto groups) {
    emulator::launch(blocks, timerome::kThreads, 0, [=] {
      timerome::gram_kernel<T, decltype(groups)::value>(static_cast<const T*>(keys), lengths, gram, batch, int(n),
                                                        int(d), int(splits));
    });
  });
}

extern "C" int emulated_gram(const void* keys, const int64_t* lengths, double* gram, int64_t batch, int64_t n,
                             int64_t d, int64_t splits, int dtype, int blocks) {
  try {
    if (dtype == 0) run<float>(keys, lengths, gram, batch, n, d, splits, blocks);
    if (dtype == 1) run<__half>(keys, lengths, gram, batch, n, d, splits, blocks);
    if (dtype == 2) run<__nv_bfloat16>(keys, lengths, gram, batch, n, d, splits, blocks);
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}
