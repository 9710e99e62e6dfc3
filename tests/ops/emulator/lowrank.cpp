// The CUDA kernels of sparse_lowrank_residual, run by the emulator; called from tests/ops/test_cuda_kernels.py.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "emulator.h"
#include "lowrank_kernel.cuh"

using namespace timerome;

template <int kTiles, class Row, int kRowParts, class Key>
static void score(const LowrankCuda& a, int blocks) {
  constexpr int kWarps = kScoreWarps<kTiles>;
  emulator::launch(blocks, 32 * kWarps, score_gate_shared_bytes(int(a.n), kWarps),
                   [=] { score_gate_kernel<kTiles, Row, kRowParts, Key>(a); });
}

template <int kTiles, class Key>
static void score(const LowrankCuda& a, int blocks) {
  if (a.dtype == 0) return score<kTiles, float, 3, Key>(a, blocks);
  if (a.dtype == 1) return score<kTiles, __half, 3, Key>(a, blocks);
  a.mean ? score<kTiles, __nv_bfloat16, 3, Key>(a, blocks) : score<kTiles, __nv_bfloat16, 1, Key>(a, blocks);
}

template <class Value>
static void apply(const LowrankCuda& a, int blocks) {
  emulator::launch(blocks, 32 * kApplyWarps, apply_small_shared_bytes(int(a.d)), [=] { apply_small_kernel<Value>(a); });
}

extern "C" int emulated_lowrank(void* h, const void* keys, const float* coef, const void* values, const float* mean,
                                const uint8_t* mask, float* c, int64_t* active, void* count, void* hits, int64_t rows,
                                int64_t length, int64_t d, int64_t n, int64_t m, int64_t k, double alpha, double tau,
                                bool gated, int dtype, int keys_dtype, int values_dtype, int blocks) {
  using Count = unsigned long long;
  const LowrankCuda a = {h, keys, coef, values, mean, mask, c, active, static_cast<Count*>(count),
                         static_cast<Count*>(hits), rows, length, d, n, m, k, float(alpha), float(tau), gated, dtype,
                         keys_dtype, values_dtype};
  try {
    if (n <= 64)
      keys_dtype == 2 ? score<8, __nv_bfloat16>(a, blocks) : score<8, float>(a, blocks);
    else
      keys_dtype == 2 ? score<16, __nv_bfloat16>(a, blocks) : score<16, float>(a, blocks);
    values_dtype == 2 ? apply<__nv_bfloat16>(a, blocks) : apply<float>(a, blocks);
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}
