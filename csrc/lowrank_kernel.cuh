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

#include <type_traits>

#include "device.cuh"
#include "kernels.h"
#include "rows.cuh"

namespace timerome {

constexpr int kLowrankThreads = 512;
constexpr int kLowrankWarps = kLowrankThreads / 32;
// Kernels are made for so many keys, in tiles of eight, and values, in groups of sixteen: the sides of a tensor core's
// product. What a call has less is read twice, or not at all, and has no part in the result.
template <class F>
auto for_tiles(int n, F f) {
  return n <= 40 ? f(std::integral_constant<int, 5>()) : f(std::integral_constant<int, int(kLowrankCudaMaxN) / 8>());
}
template <class F>
auto for_groups(int m, F f) {
  if (m <= 16) return f(std::integral_constant<int, 1>());
  return m <= 48 ? f(std::integral_constant<int, 3>()) : f(std::integral_constant<int, int(kLowrankCudaMaxN) / 16>());
}

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
inline __host__ __device__ int64_t stage_bytes(int tiles, int row_size, int key_size) {
  return int64_t(kScoreRows) * kStageBytes + int64_t(tiles * 8) * (kStageBytes / row_size * key_size);
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
template <class Row, int kRowParts, class Key, int kTiles>
__global__ void __launch_bounds__(kLowrankThreads) score_gate_kernel(const LowrankCuda a) {
  constexpr int kColumns = kStageColumns<Row>, kKeyBytes = kColumns * int(sizeof(Key));
  constexpr int kRowTiles = kScoreRows / 16, kShares = kScoreShares;
  constexpr int kChain = (kRowParts == 1 ? 4 : 2) / (sizeof(Key) == 4 && kTiles == 8 ? 2 : 1);  // as registers allow
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

// Values lo <= hi, of which hi is reached by no more than `wanted` entries and lo by no fewer: the same value if it is
// reached by just so many, or up to `slack` more, else two neighbours between which ties lie. To begin with, all `size`
// entries reach lo and none reaches hi; count_of(x) is how many reach x. The first x is `guess`, if it is in between.
struct Bracket {
  uint32_t lo, hi;
};
template <class Count>
__device__ inline Bracket rank_of(Count count_of, int size, int wanted, uint32_t lo, uint32_t hi, int slack = 0,
                                  uint32_t guess = 0) {
  int at_lo = size, at_hi = 0;
  bool halve = false;
  while (hi - lo > 1) {
    const uint32_t range = hi - lo;
    // Where the count would be the wanted one if it fell evenly from lo to hi; in the middle where that gets on badly.
    uint32_t step = range / 2;
    if (guess > lo && guess < hi)
      step = guess - lo;
    else if (!halve)
      step = min(max(uint32_t(float(range) * __fdividef(float(at_lo - wanted), float(at_lo - at_hi))), 1u), range - 1);
    guess = 0;
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

constexpr uint32_t kInfinity = 0x7f800000u;
constexpr uint32_t kEnd = 0x80000000u;  // above all magnitudes
constexpr uint32_t kNone = ~0u;
__device__ __forceinline__ uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

__device__ __forceinline__ const __nv_bfloat162& as_halves(const uint32_t& word) {
  return reinterpret_cast<const __nv_bfloat162&>(word);
}
// Magnitudes of two entries, cut off to bfloat16s.
__device__ __forceinline__ uint32_t halves(float lower, float upper) {
  return __byte_perm(__float_as_uint(lower), __float_as_uint(upper), 0x7632) & 0x7fff7fffu;
}
// How many halves of a warp's words are at least so much.
template <int kWords>
__device__ __forceinline__ int halves_reaching(const uint32_t (&word)[kWords], uint32_t least) {
  const uint32_t both = least << 16 | least;
  uint32_t sum = 0;  // of masks, each half a -1
#pragma unroll
  for (int i = 0; i < kWords; i++) sum += __hge2_mask(as_halves(word[i]), as_halves(both));
  const uint32_t lower = (0u - sum) & 0xffff, upper = (lower - ((sum + lower) >> 16)) & 0xffff;
  return __reduce_add_sync(~0u, int(lower + upper));
}

// --- The residual.

// A block takes kApplyRows rows. Rows that pass have the first of its slots. Of the columns a warp takes a piece of 32 in
// every kApplyColumns, and lane 4 g + q of these 4 g to 4 g + 3, for the slots 2 q and 2 q + 1.
constexpr int kApplyRows = 8;
constexpr int kApplyColumns = kLowrankWarps * 32;
constexpr int kPieces = int(kLowrankCudaMaxD) / kApplyColumns;
constexpr int kPairs = int(kLowrankCudaMaxN) / 2 + 8;

// A sample of a row says between which magnitudes the least that is kept should lie, its window. Entries above are
// counted, those inside listed, and the least is found among them. If it is not, the window moves.
constexpr int kListWords = 20, kListed = 32 * kListWords;  // entries of a window that can be listed: so many a lane
constexpr int kListStride = kListed + 4;                   // so that the slots of a warp share no bank
constexpr int kSampleWords = int(kLowrankCudaMaxD) / 8;    // every fourth column, two in a word
static_assert(kSampleWords <= kListed && kSampleWords % 32 == 0, "the sample lies where the list will");
constexpr float kDeviations = 4.5f;  // from the expected to the window's ends: one row of 100 000 is beyond

inline __host__ __device__ int64_t residual_bytes(int d) { return int64_t(kApplyRows) * up_to(d, kApplyColumns) * 4; }
inline __host__ __device__ int64_t apply_small_shared_bytes(int d, int n, int m) {
  return residual_bytes(d) + kApplyRows * kListStride * 4 + up_to(n * m, 4) * 4;
}

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

// x + alpha r where |r| is not below `least`.
__device__ __forceinline__ Quad<float> add_kept(Quad<float> x, const Quad<float>& r, float least, float alpha) {
#pragma unroll
  for (int e = 0; e < 4; e++)
    if (!(fabsf(r.e[e]) < least)) x.e[e] = add_scaled(x.e[e], alpha, r.e[e]);
  return x;
}
__device__ __forceinline__ __half2 rounded(__half, float lower, float upper) { return __floats2half2_rn(lower, upper); }
__device__ __forceinline__ __nv_bfloat162 rounded(__nv_bfloat16, float lower, float upper) {
  return __floats2bfloat162_rn(lower, upper);
}
template <class T>
__device__ __forceinline__ Quad<T> add_kept(Quad<T> x, const Quad<float>& r, float least, float alpha) {
#pragma unroll
  for (int e = 0; e < 4; e += 2) {  // the two of a word are rounded at once
    uint32_t& word = reinterpret_cast<uint32_t(&)[2]>(x)[e / 2];
    const auto both = rounded(x.e[e], __fadd_rn(to_float(x.e[e]), __fmul_rn(alpha, r.e[e])),
                              __fadd_rn(to_float(x.e[e + 1]), __fmul_rn(alpha, r.e[e + 1])));
    const uint32_t added = reinterpret_cast<const uint32_t&>(both);
    if (!(fabsf(r.e[e]) < least)) word = __byte_perm(word, added, 0x3254);
    if (!(fabsf(r.e[e + 1]) < least)) word = __byte_perm(word, added, 0x7610);
  }
  return x;
}

// A lane's part of the residual: four columns of each of its pieces, of its even slot, then of its odd one.
struct Residual {
  Quad<float>* first;  // in the shared memory, each thread's where only it looks
  int pieces;
  __device__ __forceinline__ Quad<float>& at(int piece, int odd) const { return first[(2 * piece + odd) * kLowrankThreads]; }
};

// Which entries of a lane are above a window and which inside: a bit for each.
struct Bits {
  uint32_t above, inside;
};
__device__ __forceinline__ uint32_t bit_of(int piece, int e) { return 1u << (e % 2 * 16 + piece * 2 + e / 2); }
__device__ inline Bits window_bits(const Residual& r, int odd, uint32_t lo, uint32_t hi) {
  uint32_t reaching_lo = 0, reaching_hi = 0;
  for (int b = 0; b < r.pieces; b++) {
    const Quad<float> x = r.at(b, odd);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      if (magnitude(x.e[e]) >= lo) reaching_lo |= bit_of(b, e);
      if (magnitude(x.e[e]) >= hi) reaching_hi |= bit_of(b, e);
    }
  }
  return {reaching_hi, reaching_lo & ~reaching_hi};
}
// The same, two entries at once, where the ends are bfloat16s.
__device__ __forceinline__ Bits window_bits_of_halves(const Residual& r, int odd, uint32_t lo, uint32_t hi) {
  static_assert(kPieces * 2 <= 16, "a bit for each entry");
  const uint32_t both_lo = __byte_perm(lo, lo, 0x3232), both_hi = __byte_perm(hi, hi, 0x3232);
  uint32_t reaching_lo = 0, reaching_hi = 0;
#pragma unroll
  for (int b = 0; b < kPieces; b++)
    if (b < r.pieces) {
      const Quad<float> x = r.at(b, odd);
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const uint32_t word = halves(x.e[e], x.e[e + 1]), two = bit_of(b, e) | bit_of(b, e + 1);
        reaching_lo |= __hgeu2_mask(as_halves(word), as_halves(both_lo)) & two;
        reaching_hi |= __hgeu2_mask(as_halves(word), as_halves(both_hi)) & two;
      }
    }
  return {reaching_hi, reaching_lo & ~reaching_hi};
}

// Sum over the lanes of a warp with the same q up to this one.
__device__ __forceinline__ uint32_t inclusive_scan_over_g(uint32_t sum) {
#pragma unroll
  for (int offset = 4; offset < 32; offset *= 2) {
    const uint32_t before = __shfl_up_sync(~0u, sum, offset);
    if (int(threadIdx.x & 31) >= offset) sum += before;
  }
  return sum;
}

// What is known of the slots while it is decided what is kept.
struct Choice {
  uint32_t lo[kApplyRows], hi[kApplyRows];              // windows; kNone where nothing is looked for any more
  uint32_t known_lo[kApplyRows], known_hi[kApplyRows];  // the least that is kept is in between
  uint32_t counts[kApplyRows];                          // entries above the window, times 2^16, and inside
  uint32_t least[kApplyRows];                           // magnitude that is kept
  int ties[kApplyRows];                                 // how many of that magnitude are kept; 0: all
};

// Chooses a slot's window by its sample, a warp each end of it.
__device__ inline void choose_window(Choice& choice, const uint32_t* sample, int slot, bool upper, int d, int k) {
  const int lane = threadIdx.x & 31;
  uint32_t word[kSampleWords / 32], most = 0;
#pragma unroll
  for (int w = 0; w < kSampleWords / 32; w++) {
    word[w] = sample[w * 32 + lane];
    most = max(most, max(word[w] & 0xffffu, word[w] >> 16));
  }
  constexpr uint32_t kLast = kInfinity >> 16;
  const uint32_t end = min(__reduce_max_sync(~0u, most) + 1, kLast);
  const float expected = float(k) / 4, deviation = sqrtf(expected * (1 - float(k) / float(d)) * 0.75f);
  const float spread = 1 + kDeviations * deviation;
  const int slack = int(deviation / 2);  // so exact it need not be
  const int wanted = int(ceilf(upper ? expected - spread - float(slack) : expected + spread));
  Bracket of = {end, end};
  if (!upper || wanted >= 1)
    of = rank_of([&](uint32_t x) { return halves_reaching(word, x); }, d / 4, min(wanted, d / 4), 0, end, slack,
                 end - (upper ? 0x80 : 0x100));  // a half or a quarter of the largest
  if (lane) return;
  if (upper)
    choice.hi[slot] = max(of.hi, 1u) << 16, choice.known_lo[slot] = 0, choice.known_hi[slot] = kEnd, choice.counts[slot] = 0;
  else
    choice.lo[slot] = min(of.lo, kLast - 1) << 16;
}

// Finds the least that is kept among a slot's list, or moves its window, by a warp.
__device__ inline void choose_least(Choice& choice, const uint32_t* list, int slot, int k) {
  const int lane = threadIdx.x & 31;
  const uint32_t lo = choice.lo[slot], hi = choice.hi[slot];
  if (lo == kNone) return;
  const int above = int(choice.counts[slot] >> 16), inside = int(choice.counts[slot] & 0xffffu);
  uint32_t known_lo = choice.known_lo[slot], known_hi = choice.known_hi[slot], next_lo = kNone, next_hi = kNone;
  uint32_t least = 0;
  int ties = 0;
  if (above >= k) {
    known_lo = next_lo = hi;
    next_hi = known_hi - hi < 2 * (hi - lo) ? known_hi : hi + 2 * (hi - lo);
  } else if (above + inside < k) {
    known_hi = next_hi = lo;
    next_lo = lo - known_lo < 2 * (hi - lo) ? known_lo : lo - 2 * (hi - lo);
  } else if (above + inside == k) {
    least = lo;
  } else if (hi - lo == 1) {
    least = lo, ties = k - above;
  } else if (inside > kListed) {
    known_lo = lo, known_hi = next_hi = hi, next_lo = lo + (hi - lo) / 2;
  } else {
    const auto find = [&](auto words) {
      constexpr int kWords = decltype(words)::value;
      uint32_t entry[kWords];
#pragma unroll
      for (int w = 0; w < kWords; w++) entry[w] = w * 32 + lane < inside ? list[w * 32 + lane] & 0x7fffffffu : 0;
      const auto reaching = [&](uint32_t x) {
        int count = 0;
#pragma unroll
        for (int w = 0; w < kWords; w++) count += entry[w] >= x;
        return __reduce_add_sync(~0u, count);
      };
      const Bracket of = rank_of(reaching, inside, k - above, lo, hi);
      least = of.lo;
      if (of.lo < of.hi) ties = k - above - reaching(of.hi);
    };
    inside <= kListed / 2 ? find(std::integral_constant<int, kListWords / 2>()) : find(std::integral_constant<int, kListWords>());
  }
  __syncwarp();  // all lanes have read what the first now writes
  if (lane) return;
  choice.lo[slot] = next_lo, choice.hi[slot] = next_hi, choice.known_lo[slot] = known_lo, choice.known_hi[slot] = known_hi;
  choice.least[slot] = max(least, 1u), choice.ties[slot] = least ? ties : 0;  // to add zero changes nothing
  choice.counts[slot] = 0;
}

// Decides for `count` slots what is kept: entries whose magnitude reaches choice.least[slot], or, if it returns true, all
// that are not zero: then the others were made so. Called by all threads; `lists` has room for kApplyRows * kListStride.
__device__ inline bool choose(const Residual& r, Choice& choice, uint32_t* lists, int count, int d, int k) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, q = lane & 3;
#pragma unroll
  for (int odd = 0; odd < 2; odd++)
#pragma unroll
    for (int b = 0; b < kPieces; b += 2)
      lists[(2 * q + odd) * kListStride + b / 2 * (kApplyColumns / 4) + warp * 8 + g] =
          halves(b < r.pieces ? r.at(b, odd).e[0] : 0, b + 1 < r.pieces ? r.at(b + 1, odd).e[0] : 0);
  __syncthreads();
  if (warp / 2 < count) choose_window(choice, lists + warp / 2 * kListStride, warp / 2, warp % 2, d, k);
  __syncthreads();

  const auto slots_where = [&](auto f) { return __ballot_sync(~0u, lane < count && f(lane % kApplyRows)); };
  for (uint32_t open = (1u << count) - 1; open;) {
#pragma unroll
    for (int odd = 0; odd < 2; odd++) {
      const int slot = 2 * q + odd;
      const bool looks = open >> slot & 1;
      const uint32_t lo = looks ? choice.lo[slot] : 0, hi = looks ? choice.hi[slot] : 0;
      Bits bits;
      // Magnitudes too small for a float's full precision are left to the integers, whatever the cores make of them.
      if (__ballot_sync(~0u, (lo | hi) & 0xffffu || lo - 1 < 0x7fffffu || hi > kInfinity))
        bits = window_bits(r, odd, lo, hi);
      else
        bits = window_bits_of_halves(r, odd, lo, hi);
      const uint32_t above = looks ? bits.above : 0, inside = looks ? bits.inside : 0;
      const uint32_t own = uint32_t(__popc(above)) << 16 | uint32_t(__popc(inside));
      const uint32_t sum = inclusive_scan_over_g(own);
      uint32_t base = 0;
      if (g == 7 && looks) base = atomicAdd(&choice.counts[slot], sum);
      base = __shfl_sync(~0u, base, 28 + q);
      const int last = int((base + sum) & 0xffffu);
      if (last > kListed) continue;
      uint32_t* place = lists + slot * kListStride + last - __popc(inside);
#pragma unroll
      for (int b = 0; b < kPieces; b++)
        if (b < r.pieces) {
          const Quad<float> x = r.at(b, odd);
#pragma unroll
          for (int e = 0; e < 4; e++)
            if (inside & bit_of(b, e)) *place++ = __float_as_uint(x.e[e]);
        }
    }
    __syncthreads();
    if (warp < count) choose_least(choice, lists + warp * kListStride, warp, k);
    __syncthreads();
    open = slots_where([&](int slot) { return choice.lo[slot] != kNone; });
  }

  const uint32_t odd_ones = slots_where([&](int slot) { return choice.ties[slot] || choice.least[slot] > kInfinity; });
  if (!odd_ones) return false;
  // Of entries equal to the least, those of the first columns are kept: they are counted by piece and warp.
  int* const tied = reinterpret_cast<int*>(lists);
  const auto place_of = [&](int slot, int b, int w) { return (slot * kPieces + b) * kLowrankWarps + w; };
  const auto own_ties = [&](const Quad<float>& of, uint32_t least) {
    uint32_t sum = 0;
#pragma unroll
    for (int e = 0; e < 4; e++) sum += magnitude(of.e[e]) == least;
    return sum;
  };
  for (int odd = 0; odd < 2; odd++)
    for (int b = 0; b < kPieces; b++) {
      const int slot = 2 * q + odd;
      const uint32_t sum = inclusive_scan_over_g(b < r.pieces ? own_ties(r.at(b, odd), choice.least[slot]) : 0);
      if (g == 7) tied[place_of(slot, b, warp)] = int(sum);
    }
  __syncthreads();
  if (threadIdx.x < kApplyRows) {
    int before = 0;
    for (int i = 0; i < kPieces * kLowrankWarps; i++) {
      const int here = tied[place_of(threadIdx.x, 0, i)];
      tied[place_of(threadIdx.x, 0, i)] = before;
      before += here;
    }
  }
  __syncthreads();
  for (int odd = 0; odd < 2; odd++)
    for (int b = 0; b < r.pieces; b++) {  // as many for all lanes of a warp
      const int slot = 2 * q + odd, ties = choice.ties[slot];
      const uint32_t least = choice.least[slot], own = own_ties(r.at(b, odd), least);
      int before = tied[place_of(slot, b, warp)] + int(inclusive_scan_over_g(own) - own);
#pragma unroll
      for (int e = 0; e < 4; e++) {
        float& x = r.at(b, odd).e[e];
        if (magnitude(x) < least || (magnitude(x) == least && ties && before++ >= ties)) x = 0.0f;
      }
    }
  __syncthreads();  // the lists are free again
  return true;
}

// out = h + alpha S_k(c D), c = s A, on the rows that mask and gate let through; out = h on the others.
template <class Row, class Value, int kGroups>
__global__ void __launch_bounds__(kLowrankThreads, 1) apply_small_kernel(const LowrankCuda a) {
  __shared__ float score[kApplyRows * kLowrankCudaMaxN];
  __shared__ __align__(16) uint32_t pairs[3 * kApplyRows * kPairs];  // c as three bfloat16s, two columns a word
  __shared__ int active[kApplyRows], slot_row[kApplyRows];
  __shared__ Choice choice;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, q = lane & 3;
  const int n = int(a.n), m = int(a.m), d = int(a.d), k = int(a.k), width = score_columns(n);
  constexpr int kInner = kGroups * 16;
  uint32_t* const lists = reinterpret_cast<uint32_t*>(dynamic_shared<char>() + residual_bytes(d));
  float* const coef = reinterpret_cast<float*>(lists + kApplyRows * kListStride);
  const int column0 = warp * 32 + 4 * g;
  const int pieces = max(0, (d - warp * 32 + kApplyColumns - 1) / kApplyColumns);  // all of a piece exists, or nothing
  const Residual residual = {dynamic_shared<Quad<float>>() + threadIdx.x, pieces};
  const auto over_splits = [&](const float* table, int64_t size, int64_t i) {
    float sum = 0;
#pragma unroll 8
    for (int s = 0; s < a.splits; s++) sum += table[s * size + i];
    return sum;
  };
  for (int i = threadIdx.x; i < n * m; i += kLowrankThreads) coef[i] = a.coef[i];
  constexpr bool kLittle = sizeof(Value) == 2;   // values leave registers for more of them, for c and for rows
  constexpr int kAhead = kLittle ? kGroups : 1;  // groups of values that are on their way
  wait_for_last_launch();

  for (int64_t row0 = int64_t(blockIdx.x) * kApplyRows; row0 < a.rows; row0 += int64_t(gridDim.x) * kApplyRows) {
    const int rows = int(a.rows - row0 < kApplyRows ? a.rows - row0 : kApplyRows);
    for (int i = threadIdx.x; i < rows * width; i += kLowrankThreads)
      score[i] = over_splits(a.scores, a.rows * width, row0 * width + i);
    if (threadIdx.x < kApplyRows) active[threadIdx.x] = 0;
    __syncthreads();
    if (warp < rows) {  // a warp a row
      bool passes = !a.mask || a.mask[row0 + warp];
      if (passes && a.gated) {
        const float row_norm = sqrtf(over_splits(a.row_squares, a.rows, row0 + warp));
        bool near = false;  // 0 / 0 and NaN reach nothing
        for (int j = lane; j < m; j += 32) near = near || score[warp * width + j] / (row_norm * a.key_norms[j]) >= a.tau;
        passes = __ballot_sync(~0u, near);
      }
      if (lane == 0) {
        active[warp] = passes;
        if (passes) atomicAdd(a.hits + (a.length == a.rows ? 0 : (row0 + warp) / a.length), 1ull);
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

    // c, while the first values are on their way.
    const int count = __popc(passing);
    // Values past the last are read as the last: their c is zero.
    int offset[kGroups][4];
#pragma unroll
    for (int l = 0; l < kGroups; l++)
#pragma unroll
      for (int i = 0; i < 4; i++) offset[l][i] = min(l * 16 + 2 * q + (i & 1) + (i & 2) * 4, m - 1) * d + column0;
    const auto load = [&](Quad<Value>(&value)[4], int l, int b) {
      if (b < pieces)
#pragma unroll
        for (int i = 0; i < 4; i++)
          value[i] = reinterpret_cast<const Quad<Value>&>(
              (static_cast<const Value*>(a.values) + b * kApplyColumns)[offset[l][i]]);
    };
    Quad<Value> value[kAhead][4];
#pragma unroll
    for (int l = 0; l < kAhead; l++) load(value[l], l, 0);
    if (passing >> threadIdx.x % 32 & 1 && threadIdx.x < 32)
      slot_row[__popc(passing & ((1u << threadIdx.x) - 1))] = threadIdx.x;
    __syncthreads();
    for (int i = threadIdx.x; i < kApplyRows * kInner; i += kLowrankThreads) {
      const int slot = i / kInner, j = i % kInner;
      float own = 0;
      if (slot < count && j < m) {
        const float* const s = score + slot_row[slot] * width;
#pragma unroll 8
        for (int l = 0; l < n; l++) own += s[l] * coef[l * m + j];
      }
      const Parts<3> parts = split<3>({own, __shfl_down_sync(~0u, own, 1), 0.0f, 0.0f});
      const int word = j / 16 * 8 + j / 2 % 4 * 2 + j / 8 % 2;  // what one lane takes lies side by side
      if (j % 2 == 0)
#pragma unroll
        for (int p = 0; p < 3; p++) pairs[(p * kApplyRows + slot) * kPairs + word] = parts.pair[p][0];
    }
    __syncthreads();

    // The residual.
    const auto c_at = [&](int l) {
      Parts<3> c;
#pragma unroll
      for (int p = 0; p < 3; p++) {
        const uint2 pair = reinterpret_cast<const uint2&>(pairs[(p * kApplyRows + g) * kPairs + 2 * q + l * 8]);
        c.pair[p][0] = pair.x, c.pair[p][1] = pair.y;
      }
      return c;
    };
    Parts<3> c[kGroups];
    if (kLittle)
#pragma unroll
      for (int l = 0; l < kGroups; l++) c[l] = c_at(l);
#pragma unroll(kLittle ? 2 : 1)
    for (int b = 0; b < pieces; b++) {
      float sum[2][4] = {};
#pragma unroll
      for (int l = 0; l < kGroups; l++) {
        if (!kLittle) c[l] = c_at(l);
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const Columns<kPartsOf<Value>> of = columns(value[l % kAhead], j);
          if (j == 1) load(value[l % kAhead], (l + kAhead) % kGroups, b + (l + kAhead) / kGroups);
          multiply_add(sum[j], of.lower, of.upper, c[l]);
        }
      }
#pragma unroll
      for (int odd = 0; odd < 2; odd++)
        residual.at(b, odd) = {sum[0][odd], sum[0][2 + odd], sum[1][odd], sum[1][2 + odd]};
    }

    const auto place_of = [&](int odd) { return (row0 + slot_row[min(2 * q + odd, count - 1)]) * a.d + column0; };
    constexpr int kLoads = 4;  // that are on their way
    const auto load_rows = [&](Quad<Row>(&x)[kLoads], int odd, int first) {
      const Row* const from = static_cast<const Row*>(a.h) + place_of(odd);
#pragma unroll
      for (int b = 0; b < kLoads; b++)
        if (first + b < pieces) x[b] = reinterpret_cast<const Quad<Row>&>(from[(first + b) * kApplyColumns]);
    };
    Quad<Row> x[2][kLoads];
    if (kLittle) load_rows(x[0], 0, 0);  // they come while it is decided what is kept
    const bool selects = k < d, zeroed = selects && choose(residual, choice, lists, count, d, k);
    if (!kLittle) load_rows(x[0], 0, 0);
#pragma unroll
    for (int i = 0; i < 2 * kPieces / kLoads; i++) {
      const int odd = i / (kPieces / kLoads), first = i % (kPieces / kLoads) * kLoads, next = i + 1;
      if (next < 2 * kPieces / kLoads)
        load_rows(x[next % 2], next / (kPieces / kLoads), next % (kPieces / kLoads) * kLoads);
      Row* const to = static_cast<Row*>(a.out) + place_of(odd);
      const uint32_t chosen = zeroed ? 1 : choice.least[min(2 * q + odd, count - 1)];
      const float least = selects ? __uint_as_float(chosen) : 0.0f;
      if (2 * q + odd < count)
#pragma unroll
        for (int b = 0; b < kLoads; b++)
          if (first + b < pieces)
            reinterpret_cast<Quad<Row>&>(to[(first + b) * kApplyColumns]) =
                add_kept(x[i % 2][b], residual.at(first + b, odd), least, a.alpha);
    }
    __syncthreads();  // the next rows take the same shared memory
  }
}

}  // namespace timerome
