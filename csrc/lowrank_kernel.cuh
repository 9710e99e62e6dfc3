// Device side of sparse_lowrank_residual for few keys: no torch, no launches, so that it compiles anywhere and runs in
// the test emulator.
//
// Two kernels. score_gate reads h and the keys and writes scores; apply_small applies the gate and makes, selects and
// adds the residual of the rows that pass. So a row that does not pass costs one reading.
//
// Products run on the tensor cores, in bfloat16 with float32 sums, and are as good as float32 ones: a float32 is the
// exact sum of three bfloat16s, and all products of two parts that are large enough to count are made. The tensor
// cores' own sums are cut off rather than rounded, so they are kept to 64 columns and added up outside.
#pragma once
#include <math.h>

#include "device.cuh"
#include "kernels.h"
#include "rows.cuh"

namespace timerome {

constexpr int kLowrankThreads = 512;
constexpr int kLowrankWarps = kLowrankThreads / 32;
constexpr int kTiles = int(kLowrankCudaMaxN) / 8;  // of eight keys: one side of a tensor core product

template <class T>
constexpr int kPartsOf = sizeof(T) == 4 ? 3 : 1;  // of float and bfloat16

inline __host__ __device__ int up_to(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// Four floats as sums of bfloat16s, in pairs as the tensor cores take them.
template <int kParts>
struct Parts {
  uint32_t pair[kParts][2];
};

// The upper half of a float's bits is a bfloat16, what is left over a float again. An infinity leaves NaN over.
template <int kParts>
__device__ __forceinline__ Parts<kParts> split(Quad<float> x) {
  constexpr uint32_t kUpper = 0xffff0000u;
  Parts<kParts> parts;
#pragma unroll
  for (int p = 0; p < kParts; p++) {
#pragma unroll
    for (int i = 0; i < 2; i++)
      parts.pair[p][i] = __float_as_uint(x.e[2 * i]) >> 16 | (__float_as_uint(x.e[2 * i + 1]) & kUpper);
#pragma unroll
    for (int j = 0; j < 4; j++) x.e[j] -= __uint_as_float(__float_as_uint(x.e[j]) & kUpper);
  }
  return parts;
}

template <class T>
__device__ __forceinline__ Quad<float> to_floats(const Quad<T>& x) {
  return {to_float(x.e[0]), to_float(x.e[1]), to_float(x.e[2]), to_float(x.e[3])};
}

template <int kParts, class T>
__device__ __forceinline__ Parts<kParts> parts_of(const Quad<T>& x) {
  return split<kParts>(to_floats(x));
}
template <>
__device__ __forceinline__ Parts<1> parts_of<1>(const Quad<__nv_bfloat16>& x) {
  return reinterpret_cast<const Parts<1>&>(x);
}

// sum (16, 8) += [lower; upper] (16, 16) other (16, 8), spread over the warp: lane 4 g + q holds the entries q of row
// g of lower and upper, four each, those of column g of other, and of the sum the entries 2 q and 2 q + 1 of row g,
// then of row g + 8. Which four of the 16 inner entries a lane holds does not matter, if it is the same for all.
template <int kLeft, int kRight>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const Parts<kLeft>& lower, const Parts<kLeft>& upper,
                                             const Parts<kRight>& other) {
#pragma unroll
  for (int order = 2; order >= 0; order--)  // the small ones first; those beyond are below a float's last bit
#pragma unroll
    for (int p = 0; p < kLeft; p++) {
      const int o = order - p;
      if (o >= 0 && o < kRight)
        mma(sum, {lower.pair[p][0], upper.pair[p][0], lower.pair[p][1], upper.pair[p][1]},
            {other.pair[o][0], other.pair[o][1]});
    }
}

// --- Scores.

// A block takes kScoreRows rows and, of their columns, a part of its own, so that all multiprocessors have work and each
// reads few keys. The columns come in stages, each row's part of a stage kStageBytes long; as many stages as fit are on
// their way to the shared memory at once.
constexpr int kScoreRows = 128;
constexpr int kScoreShares = kLowrankWarps / (kScoreRows / 16);  // warps that share the columns of 16 rows
constexpr int kStageBytes = 256;
template <class Row>
constexpr int kStageColumns = kStageBytes / int(sizeof(Row));

inline __host__ __device__ int score_columns(int n) { return up_to(n, 8); }
inline __host__ __device__ int64_t stage_bytes(int n, int row_size, int key_size) {
  return int64_t(kScoreRows) * kStageBytes + int64_t(score_columns(n)) * (kStageBytes / row_size * key_size);
}
// What the sums of the warps take when all stages are done.
inline __host__ __device__ int64_t score_sums_bytes(int n) {
  return int64_t(kScoreShares) * kScoreRows * (score_columns(n) + 1) * int64_t(sizeof(float));
}

// What a byte's place within its row of a stage is changed by (xor), so that the rows a warp reads at once share no bank,
// be it in pieces of 8 bytes or of 16.
__device__ __forceinline__ int shift_of(int row) { return (row & 1) << 6 | (row & 2) << 4; }

// What one thread copies of each stage: 16 bytes of every kStep-th row.
template <class T, int kRowBytes, int kMost>
struct Fetch {
  static constexpr int kChunks = kRowBytes / 16, kStep = kLowrankThreads / kChunks, kRows = (kMost + kStep - 1) / kStep;
  const T* from;
  int column, row, to, offset[kRows];

  // The first row, how many of them there are, and their length; rows past the last are read as the last.
  __device__ __forceinline__ Fetch(const void* rows, int count, int d)
      : from(static_cast<const T*>(rows)), column(threadIdx.x % kChunks * (16 / int(sizeof(T)))),
        row(threadIdx.x / kChunks), to(row * kRowBytes + (threadIdx.x % kChunks * 16 ^ shift_of(row))) {
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
__device__ __forceinline__ const Quad<T>& staged(const char* row, int column, int shift) {
  return *reinterpret_cast<const Quad<T>*>(row + (column * int(sizeof(T)) ^ shift));
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

// Scores (h - mean) K^T of this block's columns, and the squares of rows that the gate divides by.
template <class Row, int kRowParts, class Key>
__global__ void __launch_bounds__(kLowrankThreads) score_gate_kernel(const LowrankCuda a) {
  constexpr int kColumns = kStageColumns<Row>, kKeyBytes = kColumns * int(sizeof(Key));
  constexpr int kRowTiles = kScoreRows / 16, kShares = kScoreShares, kChain = kRowParts == 1 ? 4 : 2;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, q = lane & 3;
  const int n = int(a.n), d = int(a.d), width = score_columns(n), splits = a.splits, stages = a.stages;
  if (blockIdx.x < kPrepareBlocks) return prepare<Key>(a);
  const int64_t row0 = (blockIdx.x - kPrepareBlocks) / splits * int64_t(kScoreRows);
  const int split_index = (blockIdx.x - kPrepareBlocks) % splits;
  if (a.mask) {
    const int64_t row = row0 + threadIdx.x;
    if (!__syncthreads_or(threadIdx.x < kScoreRows && row < a.rows && a.mask[row])) return;
  }

  char* const memory = dynamic_shared<char>();
  const int bytes = int(stage_bytes(n, int(sizeof(Row)), int(sizeof(Key))));
  const int all = (d + kColumns - 1) / kColumns;
  const int first = int(int64_t(split_index) * all / splits), last = int(int64_t(split_index + 1) * all / splits);
  const int rows = int(a.rows - row0 < kScoreRows ? a.rows - row0 : kScoreRows);
  const Fetch<Row, kStageBytes, kScoreRows> fetch_rows(static_cast<const Row*>(a.h) + row0 * a.d, rows, d);
  const Fetch<Key, kKeyBytes, int(kLowrankCudaMaxN)> fetch_keys(a.keys, n, d);
  const auto fetch = [&](int s) {
    if (s < last) {
      char* const stage = memory + (s - first) % stages * bytes;
      fetch_rows(stage, s * kColumns, kScoreRows, d);
      fetch_keys(stage + kScoreRows * kStageBytes, s * kColumns, width, d);
    }
    copy_async_commit();
  };
  for (int s = first; s < first + stages; s++) fetch(s);

  const int tile_row = warp % kRowTiles * 16, share = warp / kRowTiles, shift = shift_of(g);
  float sum[kTiles][4] = {}, row_square[2] = {};
  for (int s = first; s < last; s++) {
    copy_async_wait(stages - 1);
    __syncthreads();
    const char* const stage = memory + (s - first) % stages * bytes;
    const char* const own_rows = stage + (tile_row + g) * kStageBytes;
    const char* const own_keys = stage + kScoreRows * kStageBytes + g * kKeyBytes;
    for (int step0 = share; step0 < kColumns / 16; step0 += kChain * kShares) {
      const auto at = [&](int step) { return (step0 + step * kShares) * 16 + 4 * q; };
      Parts<kRowParts> part[kChain][2];
#pragma unroll
      for (int step = 0; step < kChain; step++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const Quad<Row>& staged_row = staged<Row>(own_rows + 8 * i * kStageBytes, at(step), shift);
          if (!a.mean && !a.gated) {
            part[step][i] = parts_of<kRowParts>(staged_row);
            continue;
          }
          Quad<float> x = to_floats(staged_row);
          if (a.mean) {
            const Quad<float> mean = load_quad<true>(a.mean, s * kColumns + at(step), d);
#pragma unroll
            for (int j = 0; j < 4; j++) x.e[j] -= mean.e[j];
            part[step][i] = split<kRowParts>(x);
          } else {
            part[step][i] = parts_of<kRowParts>(staged_row);
          }
#pragma unroll
          for (int j = 0; j < 4; j++) row_square[i] += x.e[j] * x.e[j];
        }
#pragma unroll
      for (int tile = 0; tile < kTiles; tile++) {
        if (tile * 8 >= n) break;
        float some[4] = {};
#pragma unroll
        for (int step = 0; step < kChain; step++) {
          const Quad<Key>& key = staged<Key>(own_keys + tile * 8 * kKeyBytes, at(step), shift);
          multiply_add(some, part[step][0], part[step][1], parts_of<kPartsOf<Key>>(key));
        }
#pragma unroll
        for (int i = 0; i < 4; i++) sum[tile][i] += some[i];
      }
    }
    __syncthreads();  // the slot is free again
    fetch(s + stages);
  }

  // Each share of the columns of a stage was summed by another warp.
  copy_async_wait(0);
  float* const shared = reinterpret_cast<float*>(memory);
  float* const row_squares = shared + kShares * kScoreRows * width;
#pragma unroll
  for (int tile = 0; tile < kTiles; tile++) {
    if (tile * 8 >= n) break;
#pragma unroll
    for (int i = 0; i < 4; i++)
      shared[(share * kScoreRows + tile_row + g + i / 2 * 8) * width + tile * 8 + 2 * q + i % 2] = sum[tile][i];
  }
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
  for (int i = threadIdx.x; i < rows * width; i += kLowrankThreads)
    out[i] = over_shares(shared, kScoreRows * width, i);
  if (!a.gated) return;
  for (int i = threadIdx.x; i < rows; i += kLowrankThreads)
    a.row_squares[split_index * a.rows + row0 + i] = over_shares(row_squares, kScoreRows, i);
}

// --- Selection by one warp.

// Values lo <= hi, of which hi is reached by no more than `wanted` entries of a list and lo by no fewer: the same value
// if it is reached by just so many, else two neighbours between which ties lie. To begin with, all entries reach lo and
// none reaches hi.
struct Bracket {
  uint32_t lo, hi;
};
// count_of(x) is how many reach x, `size` how many there are; up to `slack` more than wanted will do.
template <class Count>
__device__ inline Bracket rank_of(Count count_of, int size, int wanted, uint32_t lo, uint32_t hi, int slack = 0) {
  int at_lo = size, at_hi = 0;
  bool halve = false;
  while (hi - lo > 1) {
    const uint32_t range = hi - lo;
    // Where the count would be the wanted one if it fell evenly from lo to hi; in the middle where that gets on badly.
    uint32_t step = range / 2;
    if (!halve) {
      const float part = float(at_lo - wanted) / float(at_lo - at_hi);
      step = uint32_t(float(range) * part);
      step = step < 1 ? 1 : step > range - 1 ? range - 1 : step;
    }
    const int count = count_of(lo + step);
    if (count >= wanted && count <= wanted + slack) return {lo + step, lo + step};
    if (count > wanted) {
      lo += step, at_lo = count;
    } else {
      hi = lo + step, at_hi = count;
    }
    halve = hi - lo > range / 2;
  }
  return {lo, hi};
}
__device__ inline int reaching(const uint32_t* list, int size, uint32_t x) {
  int count = 0;
  for (int i = threadIdx.x & 31; i < size; i += 32) count += list[i] >= x;
  return __reduce_add_sync(~0u, count);
}

// --- The residual.

// A block takes kApplyRows rows. Rows that pass have the first of its slots. Of the columns a warp takes 32 in every
// kApplyColumns, and lane 4 g + q of these 4 g to 4 g + 3, for the slots 2 q and 2 q + 1.
constexpr int kApplyRows = 8;
constexpr int kApplyColumns = kLowrankWarps * 32;
constexpr int kPairs = int(kLowrankCudaMaxN) / 2 + 8;
constexpr int kTies = 32;                // of a row at the threshold that are cut without ado
constexpr int kBins = 816;               // of a row's histogram, by its magnitudes' exponents and two bits more
constexpr int kFirstBin = 1024 - kBins;  // all magnitudes below, under 2^-75, count for the first

inline __host__ __device__ int apply_pieces(int d) { return (d + kApplyColumns - 1) / kApplyColumns; }
inline __host__ __device__ int64_t apply_small_shared_bytes(int d) {
  return (int64_t(apply_pieces(d)) * 8 * kLowrankThreads + kApplyRows * kBins) * 4;
}

constexpr uint32_t kInfinity = 0x7f800000u;
__device__ __forceinline__ uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// Columns 2 j and 2 j + 1 of four values, as the tensor cores take them.
template <int kParts>
struct Columns {
  Parts<kParts> lower, upper;
};
__device__ __forceinline__ Columns<3> columns(const Quad<float> (&v)[4], int j) {
  return {split<3>({v[0].e[2 * j], v[1].e[2 * j], v[2].e[2 * j], v[3].e[2 * j]}),
          split<3>({v[0].e[2 * j + 1], v[1].e[2 * j + 1], v[2].e[2 * j + 1], v[3].e[2 * j + 1]})};
}
__device__ __forceinline__ Columns<1> columns(const Quad<__nv_bfloat16> (&v)[4], int j) {
  uint32_t word[4];
#pragma unroll
  for (int i = 0; i < 4; i++) word[i] = reinterpret_cast<const uint32_t(&)[2]>(v[i])[j];
  return {{{{__byte_perm(word[0], word[1], 0x5410), __byte_perm(word[2], word[3], 0x5410)}}},
          {{{__byte_perm(word[0], word[1], 0x7632), __byte_perm(word[2], word[3], 0x7632)}}}};
}

__device__ __forceinline__ __half2 rounded(__half, float lower, float upper) { return __floats2half2_rn(lower, upper); }
__device__ __forceinline__ __nv_bfloat162 rounded(__nv_bfloat16, float lower, float upper) {
  return __floats2bfloat162_rn(lower, upper);
}
// x + alpha r where keep(r).
template <class Keep>
__device__ __forceinline__ Quad<float> add_where(Quad<float> x, const Quad<float>& r, float alpha, Keep keep) {
#pragma unroll
  for (int e = 0; e < 4; e++)
    if (keep(r.e[e])) x.e[e] = add_scaled(x.e[e], alpha, r.e[e]);
  return x;
}
template <class T, class Keep>
__device__ __forceinline__ Quad<T> add_where(Quad<T> x, const Quad<float>& r, float alpha, Keep keep) {
#pragma unroll
  for (int e = 0; e < 4; e += 2) {  // the two of a word are rounded at once
    uint32_t& word = reinterpret_cast<uint32_t(&)[2]>(x)[e / 2];
    const auto both = rounded(x.e[e], __fadd_rn(to_float(x.e[e]), __fmul_rn(alpha, r.e[e])),
                              __fadd_rn(to_float(x.e[e + 1]), __fmul_rn(alpha, r.e[e + 1])));
    const uint32_t added = reinterpret_cast<const uint32_t&>(both);
    if (keep(r.e[e])) word = __byte_perm(word, added, 0x3254);
    if (keep(r.e[e + 1])) word = __byte_perm(word, added, 0x7610);
  }
  return x;
}

// Which lane, counting from the first, holds the need-th of what the lanes count, and how many those before it hold.
struct Found {
  int lane;
  int before;
};
__device__ __forceinline__ Found find(int count, int need) {
  const int before = int(warp_inclusive_scan(uint32_t(count))) - count;
  const int lane = __ffs(__ballot_sync(~0u, before < need && before + count >= need)) - 1;
  return {lane, __shfl_sync(~0u, before, lane & 31)};
}

// The bin that holds the need-th largest of a row, by one warp: how many are in the bins above, and how many in this.
struct Bin {
  int bin, above, inside;
};
__device__ inline Bin find_bin(const int* histogram, int need) {
  constexpr int kPer = (kBins + 31) / 32;
  const int lane = threadIdx.x & 31;
  int sum = 0;
  for (int i = 0; i < kPer; i++) {
    const int bin = kBins - 1 - lane * kPer - i;
    if (bin >= 0) sum += histogram[bin];
  }
  const Found of = find(sum, need);
  const int bin = kBins - 1 - of.lane * kPer - lane;
  const int count = lane < kPer && bin >= 0 ? histogram[bin] : 0;
  const Found in = find(count, need - of.before);
  return {kBins - 1 - of.lane * kPer - in.lane, of.before + in.before, __shfl_sync(~0u, count, in.lane)};
}

// out = h + alpha S_k(c D), c = s A, on the rows that mask and gate let through; out = h on the others.
template <class Row, class Value>
__global__ void __launch_bounds__(kLowrankThreads, 1) apply_small_kernel(const LowrankCuda a) {
  __shared__ float score[kApplyRows * kLowrankCudaMaxN], row_norm[kApplyRows];
  __shared__ __align__(16) uint32_t pairs[3 * kApplyRows * kPairs];  // c as three bfloat16s, two columns a word
  __shared__ int active[kApplyRows], slot_row[kApplyRows], listed[kApplyRows], total;
  __shared__ int wanted_ties[kApplyRows], ties[kApplyRows], tie_columns[kApplyRows][kTies];
  __shared__ Bin chosen[kApplyRows];
  __shared__ Bracket bracket[kApplyRows];  // of the magnitudes to list; at last lo is the least that is kept
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, q = lane & 3;
  const int n = int(a.n), m = int(a.m), d = int(a.d), k = int(a.k), width = score_columns(n), inner = up_to(m, 16);
  const bool selects = k < d;
  // The residual, four columns of one slot at a time, each thread's where only it looks; a histogram for each slot, and
  // in its place a list.
  Quad<float>* const residual = dynamic_shared<Quad<float>>() + threadIdx.x;
  int* const histograms = reinterpret_cast<int*>(dynamic_shared<Quad<float>>() + apply_pieces(d) * 2 * kLowrankThreads);
  uint32_t* const lists = reinterpret_cast<uint32_t*>(histograms);
  const int column0 = warp * 32 + 4 * g;
  const int pieces = (d - warp * 32 + kApplyColumns - 1) / kApplyColumns;  // all of a warp's columns exist, or none
  const auto over_splits = [&](const float* table, int64_t size, int64_t i) {
    float sum = 0;
#pragma unroll 8
    for (int s = 0; s < a.splits; s++) sum += table[s * size + i];
    return sum;
  };

  for (int64_t row0 = int64_t(blockIdx.x) * kApplyRows; row0 < a.rows; row0 += int64_t(gridDim.x) * kApplyRows) {
    const int rows = int(a.rows - row0 < kApplyRows ? a.rows - row0 : kApplyRows);
    for (int i = threadIdx.x; i < rows * width; i += kLowrankThreads)
      score[i] = over_splits(a.scores, a.rows * width, row0 * width + i);
    if (a.gated && threadIdx.x < rows)
      row_norm[threadIdx.x] = sqrtf(over_splits(a.row_squares, a.rows, row0 + threadIdx.x));
    __syncthreads();
    if (warp < kApplyRows) {  // a warp a row
      bool passes = warp < rows && (!a.mask || a.mask[row0 + warp]);
      if (passes && a.gated) {
        bool near = false;  // 0 / 0 and NaN reach nothing
        for (int j = lane; j < m; j += 32)
          near = near || score[warp * width + j] / (row_norm[warp] * a.key_norms[j]) >= a.tau;
        passes = __ballot_sync(~0u, near);
      }
      if (lane == 0) {
        active[warp] = passes;
        if (passes) atomicAdd(a.hits + (row0 + warp) / a.length, 1ull);
      }
    }
    __syncthreads();
    const uint32_t passing = __ballot_sync(~0u, lane < kApplyRows && active[lane % kApplyRows]);
    if (a.out != a.h && warp < rows && !(passing >> warp & 1)) {
      const int64_t bytes = a.d * int64_t(sizeof(Row)), start = (row0 + warp) * bytes;
      for (int64_t i = lane * 16; i < bytes; i += 512)
        *reinterpret_cast<Quad<float>*>(static_cast<char*>(a.out) + start + i) =
            *reinterpret_cast<const Quad<float>*>(static_cast<const char*>(a.h) + start + i);
    }
    if (!passing) continue;

    // c, and all that is counted starts anew.
    const int count = __popc(passing);
    float* const coef = reinterpret_cast<float*>(dynamic_shared<Quad<float>>());
    for (int i = threadIdx.x; i < n * m; i += kLowrankThreads) coef[i] = a.coef[i];
    if (selects)
      for (int i = threadIdx.x; i < kApplyRows * kBins; i += kLowrankThreads) histograms[i] = 0;
    if (threadIdx.x < kApplyRows) {
      listed[threadIdx.x] = ties[threadIdx.x] = 0;
      bracket[threadIdx.x] = {0, 0};
      if (passing >> threadIdx.x & 1) slot_row[__popc(passing & ((1u << threadIdx.x) - 1))] = threadIdx.x;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kApplyRows * (inner / 2); i += kLowrankThreads) {
      const int slot = i / (inner / 2), j = i % (inner / 2) * 2;
      float c[2] = {};
      if (slot < count) {
        const float* const s = score + slot_row[slot] * width;
#pragma unroll 8
        for (int l = 0; l < n; l++)
#pragma unroll
          for (int e = 0; e < 2; e++)
            if (j + e < m) c[e] += s[l] * coef[l * m + j + e];
      }
      const Parts<3> parts = split<3>({c[0], c[1], 0.0f, 0.0f});
      const int word = j / 16 * 8 + j / 2 % 4 * 2 + j / 8 % 2;  // what one lane takes lies side by side
#pragma unroll
      for (int p = 0; p < 3; p++) pairs[(p * kApplyRows + slot) * kPairs + word] = parts.pair[p][0];
    }
    __syncthreads();

    // Values past the last are read as the last: their c is zero.
    constexpr int kGroups = int(kLowrankCudaMaxN) / 16;
    int offset[kGroups][4];
#pragma unroll
    for (int l = 0; l < kGroups; l++)
#pragma unroll
      for (int i = 0; i < 4; i++) offset[l][i] = min(l * 16 + 2 * q + (i & 1) + (i & 2) * 4, m - 1) * d + column0;
    const auto load = [&](Quad<Value>(&value)[4], int l, int b) {
      if (l * 16 < m && b < pieces)
#pragma unroll
        for (int i = 0; i < 4; i++)
          value[i] = reinterpret_cast<const Quad<Value>&>(
              (static_cast<const Value*>(a.values) + b * kApplyColumns)[offset[l][i]]);
    };
    const uint32_t* const own_pairs = pairs + g * kPairs + 2 * q;
    int* const own_bins = histograms + 2 * q * kBins - kFirstBin;
    constexpr int kAhead = sizeof(Value) == 2 ? kGroups : 1;  // groups of values that are on their way
    Quad<Value> value[kAhead][4];
#pragma unroll
    for (int l = 0; l < kAhead; l++) load(value[l], l, 0);
    for (int b = 0; b < pieces; b++) {
      float sum[2][4] = {};
#pragma unroll
      for (int l = 0; l < kGroups; l++)
        if (l * 16 < m) {
          Parts<3> c;
#pragma unroll
          for (int p = 0; p < 3; p++) {
            const uint2 pair = reinterpret_cast<const uint2&>(own_pairs[p * kApplyRows * kPairs + l * 8]);
            c.pair[p][0] = pair.x, c.pair[p][1] = pair.y;
          }
          const Columns<kPartsOf<Value>> of[2] = {columns(value[l % kAhead], 0), columns(value[l % kAhead], 1)};
          const int next = l + kAhead;
          if ((next < kGroups ? next : 0) * 16 < m || kAhead == kGroups)
            load(value[l % kAhead], next % kGroups, b + next / kGroups);
          else
            load(value[l % kAhead], 0, b + 1);
#pragma unroll
          for (int j = 0; j < 2; j++) multiply_add(sum[j], of[j].lower, of[j].upper, c);
        }
#pragma unroll
      for (int odd = 0; odd < 2; odd++) {
        const Quad<float> r = {sum[0][odd], sum[0][2 + odd], sum[1][odd], sum[1][2 + odd]};
        residual[(2 * b + odd) * kLowrankThreads] = r;
        if (selects)
#pragma unroll
          for (int e = 0; e < 4; e++)
            atomicAdd(own_bins + odd * kBins + max(int(magnitude(r.e[e]) >> 21), kFirstBin), 1);
      }
    }

    if (selects) {
      // A warp a row: the bin that the threshold is in. Its magnitudes will be listed, if there is room for them and
      // they are finite: there are no others between the bin's ends then.
      __syncthreads();
      if (warp < count) {
        const Bin of = find_bin(histograms + warp * kBins, k);
        if (lane == 0) {
          chosen[warp] = of;
          const uint32_t lo = uint32_t(of.bin + kFirstBin) << 21, hi = uint32_t(of.bin + kFirstBin + 1) << 21;
          if (of.bin > 0 && hi <= kInfinity && of.inside <= kBins) bracket[warp] = {lo, hi};
        }
      }
      __syncthreads();
#pragma unroll
      for (int odd = 0; odd < 2; odd++) {
        const int slot = 2 * q + odd;
        const float lo = __uint_as_float(bracket[slot].lo), hi = __uint_as_float(bracket[slot].hi);
        int mine = 0;
#pragma unroll 2
        for (int b = 0; b < pieces; b++) {
          const Quad<float> r = residual[(2 * b + odd) * kLowrankThreads];
#pragma unroll
          for (int e = 0; e < 4; e++) mine += fabsf(r.e[e]) >= lo && fabsf(r.e[e]) < hi;
        }
        int sum = mine;
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) {
          const int before = __shfl_up_sync(~0u, sum, offset);
          if (lane >= offset) sum += before;
        }
        int base = 0;
        if (g == 7 && sum) base = atomicAdd(&listed[slot], sum);
        base = __shfl_sync(~0u, base, 28 + q);
        int place = slot * kBins + base + sum - mine;
#pragma unroll 2
        for (int b = 0; b < pieces; b++) {
          const Quad<float> r = residual[(2 * b + odd) * kLowrankThreads];
#pragma unroll
          for (int e = 0; e < 4; e++)
            if (fabsf(r.e[e]) >= lo && fabsf(r.e[e]) < hi) lists[place++] = magnitude(r.e[e]);
        }
      }
      __syncthreads();
      // A warp a row: the least magnitude that is kept.
      if (warp < count) {
        const Bracket all = bracket[warp];
        Bracket of = all;
        const int inside = chosen[warp].inside, need = k - chosen[warp].above;
        const bool has_list = all.lo < all.hi;
        if (!has_list) {
          of.hi = of.lo + 1;
        } else if (need == inside) {
          of.hi = of.lo;
        } else {
          const uint32_t* const list = lists + warp * kBins;
          of = rank_of([=](uint32_t x) { return reaching(list, inside, x); }, inside, need, of.lo, of.hi);
        }
        const int left = has_list && of.lo < of.hi ? need - reaching(lists + warp * kBins, inside, of.hi) : 0;
        __syncwarp();  // all lanes have read what the first now writes
        if (lane == 0) {
          bracket[warp] = of;
          wanted_ties[warp] = left;
          active[warp] = of.lo < of.hi;
        }
      }
      __syncthreads();
      // What is not kept of ties becomes zero: those of the last columns.
      uint32_t left = __ballot_sync(~0u, lane < count && active[lane % kApplyRows]);
      if (left) {
        const auto for_ties = [&](auto f) {
          for (int odd = 0; odd < 2; odd++) {
            const int slot = 2 * q + odd;
            if (!(left >> slot & 1) || wanted_ties[slot] == 0) continue;
            for (int b = 0; b < pieces; b++)
              for (int e = 0; e < 4; e++) {
                float& r = residual[(2 * b + odd) * kLowrankThreads].e[e];
                if (magnitude(r) == bracket[slot].lo) f(slot, b * kApplyColumns + column0 + e, r);
              }
          }
        };
        for_ties([&](int slot, int c, float&) {
          const int place = atomicAdd(&ties[slot], 1);
          if (place < kTies) tie_columns[slot][place] = c;
        });
        __syncthreads();
        for_ties([&](int slot, int c, float& r) {
          if (ties[slot] > kTies) return;
          int before = 0;
          for (int i = 0; i < ties[slot]; i++) before += tie_columns[slot][i] < c;
          if (before >= wanted_ties[slot]) r = 0.0f;
        });
        left = __ballot_sync(~0u, lane < count && active[lane % kApplyRows] &&
                                      (wanted_ties[lane % kApplyRows] == 0 || ties[lane % kApplyRows] > kTies));
      }
      // Where there are more, or there was no list: bit by bit, over the whole row.
      for (; left; left &= left - 1) {
        const int slot = __ffs(left) - 1;
        const int own_pieces = q == slot / 2 ? pieces : 0;
        uint32_t threshold = 0;
        int cut = 0, beyond = d;  // of those at the threshold so many columns are too few, so many enough
        for (int bit = 30; bit >= 0 || beyond - cut > 1; bit--) {
          const uint32_t trial = bit < 0 ? threshold : threshold | 1u << bit;
          const int before = bit < 0 ? (cut + beyond) / 2 : d;
          int here = 0;
          for (int b = 0; b < own_pieces; b++) {
            const Quad<float> r = residual[(2 * b + slot % 2) * kLowrankThreads];
#pragma unroll
            for (int e = 0; e < 4; e++)
              here += magnitude(r.e[e]) > trial ||
                      (magnitude(r.e[e]) == trial && b * kApplyColumns + column0 + e < before);
          }
          here = __reduce_add_sync(~0u, here);
          if (threadIdx.x == 0) total = 0;
          __syncthreads();
          if (lane == 0) atomicAdd(&total, here);
          __syncthreads();
          const bool enough = total >= k;
          __syncthreads();
          if (bit >= 0) {
            if (enough) threshold = trial;
          } else {
            (enough ? beyond : cut) = before;
          }
        }
        if (threadIdx.x == 0) bracket[slot].lo = max(threshold, 1u);
        for (int b = 0; b < own_pieces; b++)
#pragma unroll
          for (int e = 0; e < 4; e++) {
            float& r = residual[(2 * b + slot % 2) * kLowrankThreads].e[e];
            if (magnitude(r) == threshold && b * kApplyColumns + column0 + e >= beyond) r = 0.0f;
          }
      }
      __syncthreads();
    }

#pragma unroll
    for (int odd = 0; odd < 2; odd++) {
      const int slot = 2 * q + odd;
      if (slot >= count) continue;
      const uint32_t least = bracket[slot].lo;
      const int64_t start = (row0 + slot_row[slot]) * a.d + column0;
      const Row* const from = static_cast<const Row*>(a.h) + start;
      Row* const to = static_cast<Row*>(a.out) + start;
      constexpr int kLoads = 4;  // that are on their way
      for (int first = 0; first < pieces; first += kLoads) {
        Quad<Row> x[kLoads];
#pragma unroll
        for (int i = 0; i < kLoads; i++)
          if (first + i < pieces) x[i] = reinterpret_cast<const Quad<Row>&>(from[(first + i) * kApplyColumns]);
#pragma unroll
        for (int i = 0; i < kLoads; i++)
          if (first + i < pieces)
            reinterpret_cast<Quad<Row>&>(to[(first + i) * kApplyColumns]) =
                add_where(x[i], residual[(2 * (first + i) + odd) * kLowrankThreads], a.alpha,
                          [=](float r) { return magnitude(r) >= least; });
      }
    }
    __syncthreads();  // the next rows take the same shared memory
  }
}

}  // namespace timerome
