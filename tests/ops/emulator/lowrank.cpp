// The CUDA kernels of sparse_lowrank_residual, run by the emulator; called from tests/ops/test_cuda_kernels.py.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "emulator.h"
#include "lowrank_apply.cuh"

using namespace timerome;

static void score(const LowrankCuda& a) {
  for_score_kernel(a, [&](auto kernel, int64_t stage) {
    emulator::launch(int((a.rows + kScoreRows - 1) / kScoreRows) * a.splits + kPrepareBlocks, kLowrankThreads,
                     std::max(a.stages * stage, score_sums_bytes(int(a.n))), [=] { kernel(a); });
  });
}

static void apply(const LowrankCuda& a, int blocks, int sets) {
  for_apply_kernel(a, sets, [&](auto kernel, auto taken) {
    constexpr int kSets = decltype(taken)::value;
    emulator::launch(int(apply_small_blocks<kSets>(a.rows, blocks)), kLowrankThreads,
                     apply_small_shared_bytes<kSets>(int(a.d), int(a.n), int(a.m)), [=] { kernel(a); });
  });
}

extern "C" int emulated_lowrank(const void* h, void* out, const void* keys, const float* coef, const void* values,
                                const float* mean, const uint8_t* mask, void* hits, int64_t rows, int64_t length,
                                int64_t d, int64_t n, int64_t m, int64_t k, double alpha, double tau, bool gated,
                                int dtype, int keys_dtype, int values_dtype, int splits, int stages, int blocks,
                                int sets) {
  const int width = score_columns(int(n));
  std::vector<float> scores(splits * rows * width, NAN), row_squares(splits * rows, NAN), key_norms(n, NAN);
  LowrankCuda a = {};
  a.h = h, a.out = out, a.keys = keys, a.coef = coef, a.values = values, a.mean = mean, a.mask = mask;
  a.hits = static_cast<unsigned long long*>(hits);
  a.rows = rows, a.length = length, a.d = d, a.n = n, a.m = m, a.k = k;
  a.alpha = float(alpha), a.tau = float(tau), a.gated = gated;
  a.dtype = dtype, a.keys_dtype = keys_dtype, a.values_dtype = values_dtype;
  a.splits = splits, a.stages = stages;
  a.scores = scores.data(), a.row_squares = row_squares.data(), a.key_norms = key_norms.data();
  try {
    score(a);
    apply(a, blocks, sets);
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}
