// Device side of sparse_lowrank_residual for few keys: no torch, no launches, so that it compiles anywhere and runs in
// the test emulator.
//
// Two kernels. score_gate reads h and the keys, applies the gate and writes coefficients and row numbers of the rows
// that pass; apply_small makes and adds the residual of those. So a row that does not pass costs one reading.
//
// Products run on the tensor cores, in bfloat16 with float32 sums, and are as good as float32 ones: a float32 is the
// exact sum of three bfloat16s, and all products of two parts that are large enough to count are made. The tensor
// cores' own sums are cut off rather than rounded, so they are kept to a group of 16 columns and added up outside.
#pragma once
#include <math.h>

#include "device.cuh"
#include "kernels.h"
#include "rows.cuh"

namespace timerome {

constexpr int kScoreRows = 16;  // rows of a block of score_gate: one side of a tensor core product
constexpr int kApplyRows = 8;   // rows of a block of apply_small: the other side
constexpr int kApplyWarps = 16;
template <int kTiles>
constexpr int kScoreWarps = 128 / kTiles;  // as many as their registers allow
constexpr int kBinWords = 1024;            // 2048 counters of 16 bits, which is enough for a row

template <class T>
constexpr int kPartsOf = sizeof(T) == 4 ? 3 : 1;  // of float and bfloat16

inline __host__ __device__ int up_to(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }
// The distance of two rows of the residual: 4 more than a multiple of 16, so that no two writes share a bank.
inline __host__ __device__ int residual_pitch(int d) { return up_to(d, 16) + 4; }
inline __host__ __device__ int64_t score_gate_shared_bytes(int n, int warps) {
  return int64_t(warps) * ((kScoreRows + 1) * up_to(n, 8) + kScoreRows) * int64_t(sizeof(float));
}
inline __host__ __device__ int64_t apply_small_shared_bytes(int d) {
  return (int64_t(kApplyRows) * residual_pitch(d) + kApplyRows * kBinWords) * int64_t(sizeof(float));
}

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

// sum (16, 8) += [lower; upper] (16, 16) other (16, 8), spread over the warp: lane 4 g + q holds the entries q of row
// g of lower and upper, four each, those of column g of other, and of the sum the entries 2 q and 2 q + 1 of row g,
// then of row g + 8. Which four of the 16 inner entries a lane holds does not matter, if it is the same for all.
template <int kLeft, int kRight>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const Parts<kLeft>& lower, const Parts<kLeft>& upper,
                                             const Parts<kRight>& other) {
  float s[4] = {};
#pragma unroll
  for (int order = 2; order >= 0; order--)  // the small ones first; those beyond are below a float's last bit
#pragma unroll
    for (int p = 0; p < kLeft; p++) {
      const int o = order - p;
      if (o >= 0 && o < kRight)
        mma(s, {lower.pair[p][0], upper.pair[p][0], lower.pair[p][1], upper.pair[p][1]},
            {other.pair[o][0], other.pair[o][1]});
    }
#pragma unroll
  for (int i = 0; i < 4; i++) sum[i] += s[i];
}

template <class T>
__device__ __forceinline__ Quad<float> to_floats(const Quad<T>& x) {
  return {to_float(x.e[0]), to_float(x.e[1]), to_float(x.e[2]), to_float(x.e[3])};
}

// Coefficients (h - mean) K^T A of the rows that mask and gate let through, a list of these rows, and hits by sequence.
// Warps take groups of 16 columns in turn, of 16 rows and all keys, and ask for all of it before they use any.
template <int kTiles, class Row, int kRowParts, class Key>
__global__ void __launch_bounds__(32 * kScoreWarps<kTiles>) score_gate_kernel(const LowrankCuda a) {
  constexpr int kWarps = kScoreWarps<kTiles>, kThreads = 32 * kWarps;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, q = lane & 3;
  const int n = int(a.n), m = int(a.m), d = int(a.d), columns = up_to(n, 8);
  float* const scores = dynamic_shared<float>();                   // of each warp: 16 rows of columns
  float* const row_norm = scores + kWarps * kScoreRows * columns;  // of each warp: 16
  float* const key_norm = row_norm + kWarps * kScoreRows;          // of each warp: columns
  for (int64_t first = int64_t(blockIdx.x) * kScoreRows; first < a.rows; first += int64_t(gridDim.x) * kScoreRows) {
    const auto wanted = [&](int64_t row) { return row < a.rows && (!a.mask || a.mask[row]); };
    bool any = false;
    for (int i = 0; i < kScoreRows; i++) any = any || wanted(first + i);
    if (!any) continue;

    const Row* h[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int64_t row = first + g + 8 * i;
      h[i] = static_cast<const Row*>(a.h) + (row < a.rows ? row : a.rows - 1) * a.d;
    }
    float sum[kTiles][4] = {}, key_square[kTiles] = {}, row_square[2] = {};
    for (int base = warp * 16; base < d; base += kWarps * 16) {
      const int c = base + 4 * q;
      Quad<Row> row[2];
      Quad<Key> key[kTiles];
      Quad<float> mean = {};
#pragma unroll
      for (int i = 0; i < 2; i++) row[i] = load_quad<true>(h[i], c, d);
      if (a.mean) mean = load_quad<true>(a.mean, c, d);
#pragma unroll
      for (int tile = 0; tile < kTiles; tile++) {
        const int j = tile * 8 + g;
        if (tile * 8 < n)
          key[tile] = load_quad<true>(static_cast<const Key*>(a.keys) + (j < n ? j : n - 1) * a.d, c, d);
      }
      Parts<kRowParts> part[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        Quad<float> x = to_floats(row[i]);
#pragma unroll
        for (int j = 0; j < 4; j++) {
          if (a.mean) x.e[j] -= mean.e[j];
          row_square[i] += x.e[j] * x.e[j];
        }
        part[i] = split<kRowParts>(x);
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; tile++) {
        if (tile * 8 >= n) break;
        const Quad<float> x = to_floats(key[tile]);
#pragma unroll
        for (int j = 0; j < 4; j++) key_square[tile] += x.e[j] * x.e[j];
        multiply_add(sum[tile], part[0], part[1], split<kPartsOf<Key>>(x));
      }
    }

    float* const own = scores + warp * kScoreRows * columns;
#pragma unroll
    for (int tile = 0; tile < kTiles; tile++) {
      if (tile * 8 >= n) break;
#pragma unroll
      for (int i = 0; i < 4; i++) own[(g + i / 2 * 8) * columns + tile * 8 + 2 * q + i % 2] = sum[tile][i];
      const float square = quad_sum(key_square[tile]);
      if (q == 0) key_norm[warp * columns + tile * 8 + g] = square;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float square = quad_sum(row_square[i]);
      if (q == 0) row_norm[warp * kScoreRows + g + 8 * i] = square;
    }
    __syncthreads();
    const auto over_warps = [](const float* table, int size, int i) {
      float total = 0;
#pragma unroll
      for (int w = 0; w < kWarps; w++) total += table[w * size + i];
      return total;
    };
    for (int i = threadIdx.x; i < kScoreRows * columns; i += kThreads)
      scores[i] = over_warps(scores, kScoreRows * columns, i);
    for (int i = threadIdx.x; i < columns; i += kThreads) key_norm[i] = sqrtf(over_warps(key_norm, columns, i));
    if (threadIdx.x < kScoreRows) row_norm[threadIdx.x] = sqrtf(over_warps(row_norm, kScoreRows, threadIdx.x));
    __syncthreads();

    for (int r = warp; r < kScoreRows; r += kWarps) {
      const int64_t row = first + r;
      if (!wanted(row)) continue;
      const float* s = scores + r * columns;
      if (a.gated) {
        bool passes = false;  // 0 / 0 and NaN reach nothing
        for (int j = lane; j < m; j += 32) passes = passes || s[j] / (row_norm[r] * key_norm[j]) >= a.tau;
        if (!__ballot_sync(~0u, passes)) continue;
      }
      const int width = up_to(m, 16);
      for (int j = lane; j < width; j += 32) {
        float c = 0;
        if (j < m) {
#pragma unroll 8
          for (int i = 0; i < n; i++) c += s[i] * a.coef[i * m + j];
        }
        a.c[row * width + j] = c;
      }
      if (lane == 0) {
        a.active[atomicAdd(a.count, 1ull)] = row;
        atomicAdd(a.hits + row / a.length, 1ull);
      }
    }
    __syncthreads();  // the next rows take the same shared memory
  }
}

// Which lane, counting from the first, holds the need-th of what the lanes count, and how many those before it hold.
struct Found {
  int lane;
  uint32_t before;
};
__device__ __forceinline__ Found find(uint32_t count, uint32_t need) {
  const uint32_t before = warp_inclusive_scan(count) - count;
  const int lane = __ffs(__ballot_sync(~0u, before < need && before + count >= need)) - 1;
  return {lane, __shfl_sync(~0u, before, lane)};
}

// Kept of a row are magnitudes above the threshold, and those equal to it before column cut.
struct Selection {
  uint32_t threshold;
  int cut;
};

// The k largest magnitudes of a row in shared memory, 0 < k < d, by one warp: the same radix selection as in
// sparsify_add_kernel.cuh.
__device__ inline Selection select_row(const float* row, int d, int k, uint32_t* words) {
  const int lane = threadIdx.x & 31;
  const auto magnitude = [&](int c) { return __float_as_uint(row[c]) & 0x7fffffffu; };
  uint32_t threshold = 0, need = k, count = 0;
#pragma unroll
  for (int pass = 0; pass < 3; pass++) {
    const int shift = pass == 0 ? 20 : pass == 1 ? 10 : 0;
    for (int i = lane; i < kBinWords; i += 32) words[i] = 0;
    __syncwarp();
    for (int c = lane; c < d; c += 32) {
      const uint32_t bits = magnitude(c), bin = bits >> shift & (pass == 0 ? 2047 : 1023);
      if (pass == 0 || bits >> (shift + 10) == threshold) atomicAdd(&words[bin / 2], bin % 2 ? 0x10000u : 1u);
    }
    __syncwarp();
    // From the last bin down: first the lane of 32 words, in turn so that no two lanes read one bank, then the word.
    const auto both = [](uint32_t word) { return (word & 0xffffu) + (word >> 16); };
    uint32_t sum = 0;
    for (int i = 0; i < 32; i++) sum += both(words[(31 - lane) * 32 + (i + lane) % 32]);
    Found found = find(sum, need);
    need -= found.before;
    const int last = (31 - found.lane) * 32 + 31;
    const uint32_t word = words[last - lane];
    found = find(both(word), need);
    need -= found.before;
    const uint32_t counts = __shfl_sync(~0u, word, found.lane), upper = counts >> 16;
    const bool in_upper = need <= upper;
    count = in_upper ? upper : counts & 0xffffu;
    if (!in_upper) need -= upper;
    const uint32_t bin = 2 * (last - found.lane) + in_upper;
    threshold = pass == 0 ? bin : threshold << 10 | bin;
  }
  int cut = d;
  for (int first = 0; need < count && first < d; first += 32) {  // more ties than places: up to which column?
    const bool tied = first + lane < d && magnitude(first + lane) == threshold;
    const uint32_t here = __popc(__ballot_sync(~0u, tied));
    if (here >= need) {
      cut = first + find(tied, need).lane + 1;
      break;
    }
    need -= here;
  }
  return {threshold, cut};
}

template <class T>
__device__ __forceinline__ void add_row(T* h, const float* r, int d, Selection keep, float alpha) {
  for (int c = (threadIdx.x & 31) * 4; c < d; c += 128) {
    Quad<T> x = load_quad<true>(h, c, d);
    const Quad<float> value = load_quad<true>(r, c, d);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const uint32_t magnitude = __float_as_uint(value.e[j]) & 0x7fffffffu;
      if (magnitude > keep.threshold || (magnitude == keep.threshold && c + j < keep.cut))
        x.e[j] = add_scaled(x.e[j], alpha, value.e[j]);
    }
    store_quad<true>(h, c, d, x);
  }
}

// h += alpha S_k(c D) on the rows that score_gate listed, eight at a time, their residual in shared memory.
template <class Value>
__global__ void __launch_bounds__(32 * kApplyWarps) apply_small_kernel(const LowrankCuda a) {
  constexpr int kParts = kPartsOf<Value>, kThreads = 32 * kApplyWarps;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, q = lane & 3;
  const int m = int(a.m), d = int(a.d), width = up_to(m, 16), pitch = residual_pitch(d);
  float* const residual = dynamic_shared<float>();
  float* const bins = residual + kApplyRows * pitch;
  float* const coefficients = bins;  // until the residual is there
  const int64_t count = int64_t(*a.count);
  for (int64_t first = int64_t(blockIdx.x) * kApplyRows; first < count; first += int64_t(gridDim.x) * kApplyRows) {
    for (int i = threadIdx.x; i < kApplyRows * width; i += kThreads) {
      const int64_t place = first + i / width;
      float c = place < count ? a.c[a.active[place] * width + i % width] : 0.0f;
      if (kParts == 1) c = to_float(from_float<__nv_bfloat16>(c));
      coefficients[i] = c;
    }
    __syncthreads();
    for (int base = warp * 64; base < d; base += kApplyWarps * 64) {
      float sum[4][4] = {};  // of column 4 g + j of either half of the 64: rows 2 q and 2 q + 1
      for (int k = 2 * q; k < width; k += 16) {
        const float* c = coefficients + g * width + k;
        const Parts<kParts> own = split<kParts>({c[0], c[1], c[8], c[9]});
        Quad<Value> value[2][4];
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const int j = k + (i & 1) + (i & 2) * 4;
          const int c = base + i / 4 * 32 + 4 * g;
          if (j < m)
            value[i / 4][i % 4] = load_quad<true>(static_cast<const Value*>(a.values) + j * a.d, c, d);
          else
            value[i / 4][i % 4] = {};
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const auto column = [&](const Quad<Value>(&v)[4]) {
            return split<kParts>(to_floats(Quad<Value>{v[0].e[j], v[1].e[j], v[2].e[j], v[3].e[j]}));
          };
          multiply_add(sum[j], column(value[0]), column(value[1]), own);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; i++)
        store_quad<true>(residual + (2 * q + i % 2) * pitch, base + i / 2 * 32 + 4 * g, pitch,
                         Quad<float>{sum[0][i], sum[1][i], sum[2][i], sum[3][i]});
    }
    __syncthreads();
    if (warp < kApplyRows && first + warp < count) {  // one warp a row
      const float* r = residual + warp * pitch;
      const int k = int(a.k);
      Selection keep = {0, d};
      if (k < d) keep = select_row(r, d, k, reinterpret_cast<uint32_t*>(bins) + warp * kBinWords);
      const int64_t start = a.active[first + warp] * a.d;
      if (a.dtype == 0) add_row(static_cast<float*>(a.h) + start, r, d, keep, a.alpha);
      if (a.dtype == 1) add_row(static_cast<__half*>(a.h) + start, r, d, keep, a.alpha);
      if (a.dtype == 2) add_row(static_cast<__nv_bfloat16*>(a.h) + start, r, d, keep, a.alpha);
    }
    __syncthreads();  // the next rows take the same shared memory
  }
}

}  // namespace timerome
