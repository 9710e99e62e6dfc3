// The CUDA kernels of sparse_lowrank_residual, run by the emulator; called from tests/ops/test_cuda_kernels.py.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "emulator.h"
#include "lowrank_apply.cuh"

using namespace timerome;

template <class Row, int kRowParts, class Key>
static void score(const LowrankCuda& a) {
  for_tiles(int(a.n), [&](auto tiles) {
    constexpr int kTiles = decltype(tiles)::value;
    const int64_t bytes = a.stages * stage_bytes(kTiles, sizeof(Row), sizeof(Key));
    emulator::launch(int((a.rows + kScoreRows - 1) / kScoreRows) * a.splits + kPrepareBlocks, kLowrankThreads,
                     std::max(bytes, score_sums_bytes(int(a.n))), [=] {
                       a.gated ? score_gate_kernel<Row, kRowParts, Key, kTiles, true>(a)
                               : score_gate_kernel<Row, kRowParts, Key, kTiles, false>(a);
                     });
  });
}

template <class Key>
static void score(const LowrankCuda& a) {
  if (a.dtype == 0) return score<float, 3, Key>(a);
  if (a.dtype == 1) return score<__half, 3, Key>(a);
  a.mean ? score<__nv_bfloat16, 3, Key>(a) : score<__nv_bfloat16, 1, Key>(a);
}

template <class Row, class Value, int kGroups, int kSets>
static void apply(const LowrankCuda& a, int blocks) {
  emulator::launch(int(apply_small_blocks<kSets>(a.rows, blocks)), kLowrankThreads,
                   apply_small_shared_bytes<kSets>(int(a.d), int(a.n), int(a.m)),
                   [=] { apply_small_kernel<Row, Value, kGroups, kSets>(a); });
}

template <class Row, class Value>
static void apply(const LowrankCuda& a, int blocks, int sets) {
  for_groups(int(a.m), [&](auto groups) {
    constexpr int kGroups = decltype(groups)::value;
    if constexpr (kTwoSets<kGroups>)
      if (sets == 2) return apply<Row, Value, kGroups, 2>(a, blocks);
    apply<Row, Value, kGroups, 1>(a, blocks);
  });
}

template <class Value>
static void apply(const LowrankCuda& a, int blocks, int sets) {
  if (a.dtype == 0) return apply<float, Value>(a, blocks, sets);
  if (a.dtype == 1) return apply<__half, Value>(a, blocks, sets);
  apply<__nv_bfloat16, Value>(a, blocks, sets);
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
    keys_dtype == 2 ? score<__nv_bfloat16>(a) : score<float>(a);
    values_dtype == 2 ? apply<__nv_bfloat16>(a, blocks, sets) : apply<float>(a, blocks, sets);
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}
