// score_gate: scores of rows with keys; what it is part of is said in lowrank_products.cuh.
#pragma once
#include <math.h>

#include "lowrank_products.cuh"

namespace timerome {

// A block takes kScoreRows rows and, of their columns, a part of its own, so that all multiprocessors have work and
// each reads few keys. The columns come in stages, each row's part of a stage kStageBytes long; as many stages as fit
// are on their way to the shared memory at once.
constexpr int kScoreRows = 128;
constexpr int kScoreShares = kLowrankWarps / (kScoreRows / 16);  // warps that share the columns of 16 rows
constexpr int kStageBytes = 256;
template <class Row>
constexpr int kStageColumns = kStageBytes / int(sizeof(Row));

inline __host__ __device__ int score_columns(int n) { return up_to(n, 8); }
inline __host__ __device__ int64_t stage_bytes(int tiles, int row_size, int key_size) {
  return int64_t(kScoreRows) * kStageBytes + int64_t(tiles * 8) * (kStageBytes / row_size * key_size);
}
// What the sums of the warps take when all stages are done.
inline __host__ __device__ int64_t score_sums_bytes(int n) {
  return int64_t(kScoreShares) * kScoreRows * (score_columns(n) + 1) * int64_t(sizeof(float));
}

// What a byte's place within its row of a stage is changed by (xor), so that the rows a warp reads at once share no
// bank, be it in pieces of 8 bytes or of 16.
__device__ __forceinline__ int shift_of(int row) { return (row & 1) << 6 | (row & 2) << 4; }

// What one thread copies of each stage: 16 bytes of every kStep-th row.
template <class T, int kRowBytes, int kMost>
struct Fetch {
  static constexpr int kChunks = kRowBytes / 16, kStep = kLowrankThreads / kChunks, kRows = (kMost + kStep - 1) / kStep;
  const T* from;
  int column, row, to, offset[kRows];

  // The first row, how many of them there are, and their length; rows past the last are read as the last.
  __device__ __forceinline__ Fetch(const void* rows, int count, int d)
      : from(static_cast<const T*>(rows)),
        column(threadIdx.x % kChunks * (16 / int(sizeof(T)))),
        row(threadIdx.x / kChunks),
        to(row * kRowBytes + (threadIdx.x % kChunks * 16 ^ shift_of(row))) {
    static_assert(kStep % 4 == 0, "the rows of a thread are shifted alike");
#pragma unroll
    for (int i = 0; i < kRows; i++) offset[i] = min(row + i * kStep, count - 1) * d + column;
  }
  // Columns past the last are zero.
  __device__ __forceinline__ void operator()(char* stage, int column0, int wanted, int d) const {
    const bool valid = column0 + column < d;
#pragma unroll
    for (int i = 0; i < kRows; i++)
      if (row + i * kStep < wanted)
        copy_async(stage + to + i * kStep * kRowBytes, from + (valid ? offset[i] + column0 : 0), valid);
  }
};

template <class T>
__device__ __forceinline__ Words<T> staged(const char* row, int column, int shift) {
  return *reinterpret_cast<const Words<T>*>(row + (column * int(sizeof(T)) ^ shift));
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  return x;
}

// What is not done for each group of rows, by kPrepareBlocks blocks: norms of the keys that have a value, hits of none.
constexpr int kPrepareBlocks = 4;
template <class Key>
__device__ inline void prepare(const LowrankCuda& a) {
  constexpr int kThreads = kPrepareBlocks * kLowrankThreads, kEach = 16 / int(sizeof(Key));
  const int thread = int(blockIdx.x) * kLowrankThreads + int(threadIdx.x), lane = thread % 32;
  for (int64_t i = thread; i < a.rows / a.length; i += kThreads) a.hits[i] = 0;
  if (!a.gated) return;
  for (int j = thread / 32; j < a.m; j += kThreads / 32) {
    const Key* const key = static_cast<const Key*>(a.keys) + j * a.d;
    float square = 0;
#pragma unroll 8
    for (int c = lane * kEach; c < a.d; c += 32 * kEach) {
      alignas(16) Key x[kEach];
      reinterpret_cast<Quad<float>&>(x) = reinterpret_cast<const Quad<float>&>(key[c]);
#pragma unroll
      for (int e = 0; e < kEach; e++) square += to_float(x[e]) * to_float(x[e]);
    }
    square = warp_sum(square);
    if (lane == 0) a.key_norms[j] = sqrtf(square);
  }
}

// Scores (h - mean) K^T of this block's columns, and the squares of rows that the gate divides by. There is no mean
// where one part is all of a row.
template <class Row, int kRowParts, class Key, int kTiles, bool kGated>
__global__ void __launch_bounds__(kLowrankThreads) score_gate_kernel(const LowrankCuda a) {
  constexpr int kColumns = kStageColumns<Row>, kKeyBytes = kColumns * int(sizeof(Key));
  constexpr int kRowTiles = kScoreRows / 16, kShares = kScoreShares;
  constexpr bool kTight = sizeof(Key) == 4 ? kTiles == 8 || kRowParts == 1 : kTiles == 8 && kGated;
  constexpr int kChain = (kRowParts == 1 ? 4 : 2) / (kTight ? 2 : 1);  // as registers allow
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, q = lane & 3;
  const int n = int(a.n), d = int(a.d), width = score_columns(n), splits = a.splits, stages = a.stages;
  allow_next_launch();
  if (blockIdx.x < kPrepareBlocks) return prepare<Key>(a);
  const int64_t row0 = (blockIdx.x - kPrepareBlocks) / splits * int64_t(kScoreRows);
  const int split_index = (blockIdx.x - kPrepareBlocks) % splits;
  if (a.mask) {
    const int64_t row = row0 + threadIdx.x;
    if (!__syncthreads_or(threadIdx.x < kScoreRows && row < a.rows && a.mask[row])) return;
  }

  char* const memory = dynamic_shared<char>();
  const int bytes = int(stage_bytes(kTiles, int(sizeof(Row)), int(sizeof(Key))));
  const int all = (d + kColumns - 1) / kColumns;
  const int first = int(int64_t(split_index) * all / splits), last = int(int64_t(split_index + 1) * all / splits);
  const int rows = int(a.rows - row0 < kScoreRows ? a.rows - row0 : kScoreRows);
  const Fetch<Row, kStageBytes, kScoreRows> fetch_rows(static_cast<const Row*>(a.h) + row0 * a.d, rows, d);
  const Fetch<Key, kKeyBytes, int(kLowrankCudaMaxN)> fetch_keys(a.keys, n, d);
  const auto fetch = [&](int s, int slot) {
    if (s < last) {
      char* const stage = memory + slot * bytes;
      fetch_rows(stage, s * kColumns, kScoreRows, d);
      fetch_keys(stage + kScoreRows * kStageBytes, s * kColumns, width, d);
    }
    copy_async_commit();
  };
  for (int slot = 0; slot < stages; slot++) fetch(first + slot, slot);

  const int tile_row = warp % kRowTiles * 16, share = warp / kRowTiles, shift = shift_of(g);
  float sum[kTiles][4] = {}, row_square[2] = {};
  for (int s = first, slot = 0; s < last; s++, slot = slot + 1 < stages ? slot + 1 : 0) {
    copy_async_wait(stages - 1);
    __syncthreads();
    const char* const stage = memory + slot * bytes;
    const char* const own_rows = stage + (tile_row + g) * kStageBytes;
    const char* const own_keys = stage + kScoreRows * kStageBytes + g * kKeyBytes;
    for (int step0 = share; step0 < kColumns / 16; step0 += kChain * kShares) {
      const auto at = [&](int step) { return (step0 + step * kShares) * 16 + 4 * q; };
      Parts<kRowParts> part[kChain][2];
#pragma unroll
      for (int step = 0; step < kChain; step++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const Words<Row> row = staged<Row>(own_rows + 8 * i * kStageBytes, at(step), shift);
          Quad<float> x = to_floats(row);
          if (kRowParts == 1) {
            part[step][i] = parts_of<kRowParts>(row);
          } else {
            if (a.mean) {
              const Quad<float> mean = load_quad<true>(a.mean, s * kColumns + at(step), d);
#pragma unroll
              for (int j = 0; j < 4; j++) x.e[j] -= mean.e[j];
            }
            part[step][i] = split<kRowParts>(x);
          }
          if (kGated)
#pragma unroll
            for (int j = 0; j < 4; j++) row_square[i] += x.e[j] * x.e[j];
        }
#pragma unroll
      for (int tile = 0; tile < kTiles; tile++) {
        float some[4] = {};
#pragma unroll
        for (int step = 0; step < kChain; step++) {
          const Words<Key> key = staged<Key>(own_keys + tile * 8 * kKeyBytes, at(step), shift);
          multiply_add(some, part[step][0], part[step][1], parts_of<kPartsOf<Key>>(key));
        }
#pragma unroll
        for (int i = 0; i < 4; i++) sum[tile][i] += some[i];
      }
    }
    __syncthreads();  // the slot is free again
    fetch(s + stages, slot);
  }

  // Each share of the columns of a stage was summed by another warp.
  copy_async_wait(0);
  float* const shared = reinterpret_cast<float*>(memory);
  float* const row_squares = shared + kShares * kScoreRows * width;
#pragma unroll
  for (int tile = 0; tile < kTiles; tile++) {
    if (tile * 8 >= width) break;
#pragma unroll
    for (int i = 0; i < 4; i++)
      shared[(share * kScoreRows + tile_row + g + i / 2 * 8) * width + tile * 8 + 2 * q + i % 2] = sum[tile][i];
  }
  if (kGated)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float square = quad_sum(row_square[i]);
      if (q == 0) row_squares[share * kScoreRows + tile_row + g + 8 * i] = square;
    }
  __syncthreads();
  const auto over_shares = [&](const float* table, int size, int i) {
    float total = 0;
#pragma unroll
    for (int w = 0; w < kShares; w++) total += table[w * size + i];
    return total;
  };
  float* const out = a.scores + (split_index * a.rows + row0) * width;
  for (int i = threadIdx.x; i < rows * width; i += kLowrankThreads) out[i] = over_shares(shared, kScoreRows * width, i);
  if (!kGated) return;
  for (int i = threadIdx.x; i < rows; i += kLowrankThreads)
    a.row_squares[split_index * a.rows + row0 + i] = over_shares(row_squares, kScoreRows, i);
}

// Calls f with the kernel for these arguments and with the bytes of one of its stages.
template <class F>
auto for_score_kernel(const LowrankCuda& a, F f) {
  return for_dtype(a.dtype, [&](auto row) {
    return for_matrix(a.keys_dtype, [&](auto key) {
      return for_tiles(int(a.n), [&](auto tiles) {
        using Row = decltype(row);
        using Key = decltype(key);
        constexpr int kTiles = decltype(tiles)::value;
        const int64_t stage = stage_bytes(kTiles, int(sizeof(Row)), int(sizeof(Key)));
        if constexpr (std::is_same<Row, __nv_bfloat16>::value)
          if (!a.mean)
            return a.gated ? f(score_gate_kernel<Row, 1, Key, kTiles, true>, stage)
                           : f(score_gate_kernel<Row, 1, Key, kTiles, false>, stage);
        return a.gated ? f(score_gate_kernel<Row, 3, Key, kTiles, true>, stage)
                       : f(score_gate_kernel<Row, 3, Key, kTiles, false>, stage);
      });
    });
  });
}

}  // namespace timerome
