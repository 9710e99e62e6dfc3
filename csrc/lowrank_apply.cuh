// apply_small: adds the residual to the rows that pass; what it is part of is said in lowrank_products.cuh.
#pragma once
#include <math.h>

#include "lowrank_score.cuh"
#include "lowrank_select.cuh"

namespace timerome {

// Columns 2 j and 2 j + 1 of four values, as the tensor cores take them.
template <int kParts>
struct Columns {
  Parts<kParts> lower, upper;
};
__device__ __forceinline__ Columns<3> columns(const Words<float> (&v)[4], int j) {
  const auto entry = [&](int i, int odd) { return __uint_as_float(v[i].word[2 * j + odd]); };
  return {split<3>({entry(0, 0), entry(1, 0), entry(2, 0), entry(3, 0)}),
          split<3>({entry(0, 1), entry(1, 1), entry(2, 1), entry(3, 1)})};
}
__device__ __forceinline__ Columns<1> columns(const Words<__nv_bfloat16> (&v)[4], int j) {
  const auto two = [&](int i, uint32_t halves) { return __byte_perm(v[i].word[j], v[i + 1].word[j], halves); };
  return {{{{two(0, 0x5410), two(2, 0x5410)}}}, {{{two(0, 0x7632), two(2, 0x7632)}}}};
}

__device__ __forceinline__ uint32_t rounded(__half, float lower, float upper) {
  const __half2 both = __floats2half2_rn(lower, upper);
  return reinterpret_cast<const uint32_t&>(both);
}
__device__ __forceinline__ uint32_t rounded(__nv_bfloat16, float lower, float upper) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(lower, upper);
  return reinterpret_cast<const uint32_t&>(both);
}

// x + alpha r where |r| is not below `least`; as add_scaled, two entries at once.
template <class T>
__device__ __forceinline__ Words<T> add_kept(Words<T> x, const Quad<float>& r, float least, float alpha) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const float2 both = floats_of(T(), x.word[i]);
    const uint32_t added = rounded(T(), __fadd_rn(both.x, __fmul_rn(alpha, r.e[2 * i])),
                                   __fadd_rn(both.y, __fmul_rn(alpha, r.e[2 * i + 1])));
    if (!(fabsf(r.e[2 * i]) < least)) x.word[i] = __byte_perm(x.word[i], added, 0x3254);
    if (!(fabsf(r.e[2 * i + 1]) < least)) x.word[i] = __byte_perm(x.word[i], added, 0x7610);
  }
  return x;
}
template <>
__device__ __forceinline__ Words<float> add_kept(Words<float> x, const Quad<float>& r, float least, float alpha) {
#pragma unroll
  for (int e = 0; e < 4; e++)
    if (!(fabsf(r.e[e]) < least)) x.word[e] = __float_as_uint(add_scaled(__uint_as_float(x.word[e]), alpha, r.e[e]));
  return x;
}

// --- The shared memory of a block, beside the residual.

constexpr int kPairs = int(kLowrankCudaMaxN) / 2 + 8;

// What c is made of: coef, the scores, and c itself as three bfloat16s, two columns a word.
inline __host__ __device__ int coef_bytes(int n, int m) { return up_to(n * m, 4) * 4; }
// With two sets, the lists take its place.
template <int kSets>
inline int apply_small_shared_bytes(int d, int n, int m) {
  constexpr int kLists = Room<kSets>::kListBytes;
  const int made_of = coef_bytes(n, m) + Room<kSets>::kRows * (int(kLowrankCudaMaxN) + 3 * kPairs) * 4;
  return residual_bytes<kSets>(d) + (kSets == 1 ? kLists + made_of : made_of < kLists ? kLists : made_of);
}

// Blocks of a launch of which `most` run at once: with two sets each takes one group of rows, else what comes to it.
template <int kSets>
int64_t apply_small_blocks(int64_t rows, int most) {
  const int64_t groups = (rows + Room<kSets>::kRows - 1) / Room<kSets>::kRows;
  return kSets == 1 && groups > most ? most : groups;
}

struct Workplace {
  Quad<float>* residual;
  uint32_t* lists;
  float *coef, *score;
  uint32_t* pairs;
  int* slot_row;  // row of each slot
  Choice* choice;
};

// --- Adding the residual.

// On the rows of a block that pass, no more than kSets * kSetRows. Called by all threads.
template <class Row, class Value, int kGroups, int kSets>
__device__ __forceinline__ void edit_rows(const LowrankCuda& a, const Workplace& at, int64_t row0, uint32_t passing) {
  constexpr int kRows = Room<kSets>::kRows, kSlots = Residual<kSets>::kSlots, kInner = kGroups * 16;
  constexpr bool kLittle = sizeof(Value) == 2;   // values leave registers for more of them, for c and for rows
  constexpr int kAhead = kLittle ? kGroups : 1;  // groups of values that are on their way
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, q = lane & 3;
  const int n = int(a.n), m = int(a.m), d = int(a.d), k = int(a.k), width = score_columns(n);
  const int column0 = warp * 32 + 4 * g, count = __popc(passing);
  const int pieces = max(0, (d - warp * 32 + kApplyColumns - 1) / kApplyColumns);  // all of a piece exists, or nothing

  // c, while the first values are on their way. Values past the last are read as the last: their c is zero.
  int offset[kGroups][4];
#pragma unroll
  for (int l = 0; l < kGroups; l++)
#pragma unroll
    for (int i = 0; i < 4; i++) offset[l][i] = min(l * 16 + 2 * q + (i & 1) + (i & 2) * 4, m - 1) * d + column0;
  const auto load = [&](Words<Value>(&value)[4], int l, int b) {
    if (b < kPieces && b < pieces)
#pragma unroll
      for (int i = 0; i < 4; i++)
        value[i] = reinterpret_cast<const Words<Value>&>(
            (static_cast<const Value*>(a.values) + b * kApplyColumns)[offset[l][i]]);
  };
  Words<Value> value[kAhead][4] = {};
#pragma unroll
  for (int l = 0; l < kAhead; l++) load(value[l], l, 0);
  if (passing >> threadIdx.x % 32 & 1 && threadIdx.x < 32)
    at.slot_row[__popc(passing & ((1u << threadIdx.x) - 1))] = threadIdx.x;
  __syncthreads();
  for (int i = threadIdx.x; i < kRows * kInner; i += kLowrankThreads) {
    const int slot = i / kInner, j = i % kInner;
    float own = 0;
    if (slot < count && j < m) {
      const float* const s = at.score + at.slot_row[slot] * width;
#pragma unroll 8
      for (int l = 0; l < n; l++) own += s[l] * at.coef[l * m + j];
    }
    const Parts<3> parts = split<3>({own, __shfl_down_sync(~0u, own, 1), 0.0f, 0.0f});
    const int word = j / 16 * 8 + j / 2 % 4 * 2 + j / 8 % 2;  // what one lane takes lies side by side
    if (j % 2 == 0)
#pragma unroll
      for (int p = 0; p < 3; p++) at.pairs[(p * kRows + slot) * kPairs + word] = parts.pair[p][0];
  }
  __syncthreads();

  const auto c_of = [&](int set, int l) {
    Parts<3> c;
#pragma unroll
    for (int p = 0; p < 3; p++) {
      const uint2 pair =
          reinterpret_cast<const uint2&>(at.pairs[(p * kRows + set * kSetRows + g) * kPairs + 2 * q + l * 8]);
      c.pair[p][0] = pair.x, c.pair[p][1] = pair.y;
    }
    return c;
  };
  Parts<3> c[kSets][kGroups];
  if (kLittle)
#pragma unroll
    for (int set = 0; set < kSets; set++)
#pragma unroll
      for (int l = 0; l < kGroups; l++) c[set][l] = c_of(set, l);
  Residual<kSets> residual;
  residual.first = at.residual + threadIdx.x, residual.pieces = pieces;
  const auto make_piece = [&](int b, auto keep) {
    float sum[kSets][2][4] = {};
#pragma unroll
    for (int l = 0; l < kGroups; l++) {
      if (!kLittle)
#pragma unroll
        for (int set = 0; set < kSets; set++) c[set][l] = c_of(set, l);
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const Columns<kPartsOf<Value>> of = columns(value[l % kAhead], j);
        if (j == 1) load(value[l % kAhead], (l + kAhead) % kGroups, b + (l + kAhead) / kGroups);
#pragma unroll
        for (int set = 0; set < kSets; set++) multiply_add(sum[set][j], of.lower, of.upper, c[set][l]);
      }
    }
#pragma unroll
    for (int i = 0; i < kSlots; i++) {
      const float (&own)[2][4] = sum[i / 2];
      keep(i) = {own[0][i % 2], own[0][2 + i % 2], own[1][i % 2], own[1][2 + i % 2]};
    }
  };
#pragma unroll(kLittle ? 2 : 1)
  for (int b = 0; b < min(pieces, Room<kSets>::kShared); b++)
    make_piece(b, [&](int i) -> Quad<float>& { return residual.shared(b, i); });
#pragma unroll
  for (int b = Room<kSets>::kShared; b < kPieces; b++)
    if (b < pieces) make_piece(b, [&](int i) -> Quad<float>& { return residual.at(b, i); });
  __syncthreads();  // no more is looked for where the lists may lie

  // A lane's rows come slot by slot, one of which is on its way.
  const auto place_of = [&](int i) { return (row0 + at.slot_row[min(residual.slot(i), count - 1)]) * a.d + column0; };
  const auto load_row = [&](Words<Row>(&x)[kPieces], int i) {
    const Row* const from = static_cast<const Row*>(a.h) + place_of(i);
#pragma unroll
    for (int b = 0; b < kPieces; b++)
      x[b] = b < pieces ? reinterpret_cast<const Words<Row>&>(from[b * kApplyColumns]) : Words<Row>();
  };
  Words<Row> x[2][kPieces];
  if (kLittle) load_row(x[0], 0);  // it comes while it is decided what is kept
  const bool selects = k < d, zeroed = selects && choose(residual, *at.choice, at.lists, count, d, k);
  if (!kLittle) load_row(x[0], 0);
#pragma unroll
  for (int i = 0; i < kSlots; i++) {
    if (i + 1 < kSlots) load_row(x[(i + 1) % 2], i + 1);
    Row* const to = static_cast<Row*>(a.out) + place_of(i);
    const uint32_t chosen = zeroed ? 1 : at.choice->least[min(residual.slot(i), count - 1)];
    const float least = selects ? __uint_as_float(chosen) : 0.0f;
    if (residual.slot(i) < count)
      residual.for_pieces(i, [&](int b, const Quad<float>& r) {
        reinterpret_cast<Words<Row>&>(to[b * kApplyColumns]) = add_kept(x[i % 2][b], r, least, a.alpha);
      });
  }
}

// Which kernels there are for two sets: c of both takes the registers that are left.
template <int kGroups>
constexpr bool kTwoSets = kGroups <= 3;

// out = h + alpha S_k(c D), c = s A, on the rows that mask and gate let through; out = h on the others.
template <class Row, class Value, int kGroups, int kSets>
__global__ void __launch_bounds__(kLowrankThreads, 1) apply_small_kernel(const LowrankCuda a) {
  constexpr int kRows = Room<kSets>::kRows;
  __shared__ int active[kRows], slot_row[kRows];
  __shared__ Choice choice;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int n = int(a.n), m = int(a.m), width = score_columns(n);
  char* const memory = dynamic_shared<char>();
  char* const lists = memory + residual_bytes<kSets>(int(a.d));
  char* const made_of = lists + (kSets == 1 ? Room<1>::kListBytes : 0);
  float* const coef = reinterpret_cast<float*>(made_of);
  float* const score = reinterpret_cast<float*>(made_of + coef_bytes(n, m));
  const Workplace at = {reinterpret_cast<Quad<float>*>(memory),
                        reinterpret_cast<uint32_t*>(lists),
                        coef,
                        score,
                        reinterpret_cast<uint32_t*>(score + kRows * kLowrankCudaMaxN),
                        slot_row,
                        &choice};
  const auto over_splits = [&](const float* table, int64_t size, int64_t i) {
    float sum = 0;
#pragma unroll 8
    for (int s = 0; s < a.splits; s++) sum += table[s * size + i];
    return sum;
  };
  const auto edit_group = [&](int64_t row0) {
    const int rows = int(a.rows - row0 < kRows ? a.rows - row0 : kRows);
    for (int i = threadIdx.x; i < rows * width; i += kLowrankThreads)
      score[i] = over_splits(a.scores, a.rows * width, row0 * width + i);
    if (threadIdx.x < kRows) active[threadIdx.x] = 0;
    __syncthreads();
    if (warp < rows) {  // a warp a row
      bool passes = !a.mask || a.mask[row0 + warp];
      if (passes && a.gated) {
        const float row_norm = sqrtf(over_splits(a.row_squares, a.rows, row0 + warp));
        bool near = false;  // 0 / 0 and NaN reach nothing
        for (int j = lane; j < m; j += 32)
          near = near || score[warp * width + j] / (row_norm * a.key_norms[j]) >= a.tau;
        passes = __ballot_sync(~0u, near);
      }
      if (lane == 0) {
        active[warp] = passes;
        if (passes) atomicAdd(a.hits + (a.length == a.rows ? 0 : (row0 + warp) / a.length), 1ull);
      }
    }
    __syncthreads();
    const uint32_t passing = __ballot_sync(~0u, lane < kRows && active[lane % kRows]);
    if (a.out != a.h && warp < rows && !(passing >> warp & 1)) {
      const int64_t bytes = a.d * int64_t(sizeof(Row)), start = (row0 + warp) * bytes;
      for (int64_t i = lane * 16; i < bytes; i += 512)
        *reinterpret_cast<Quad<float>*>(static_cast<char*>(a.out) + start + i) =
            *reinterpret_cast<const Quad<float>*>(static_cast<const char*>(a.h) + start + i);
    }
    if (!passing) return;
    if (kSets == 1 || __popc(passing) <= kSetRows)
      edit_rows<Row, Value, kGroups, 1>(a, at, row0, passing);
    else
      edit_rows<Row, Value, kGroups, kSets>(a, at, row0, passing);
  };

  for (int i = threadIdx.x; i < n * m; i += kLowrankThreads) coef[i] = a.coef[i];
  wait_for_last_launch();
  if (kSets > 1) return edit_group(int64_t(blockIdx.x) * kRows);  // a block a group, whose lists take the place of coef
  for (int64_t row0 = int64_t(blockIdx.x) * kRows; row0 < a.rows; row0 += int64_t(gridDim.x) * kRows) {
    edit_group(row0);
    __syncthreads();  // the next rows take the same shared memory
  }
}

// Calls f with the kernel for these arguments and as many sets, of the ones there are, and with their number.
template <class F>
auto for_apply_kernel(const LowrankCuda& a, int sets, F f) {
  return for_dtype(a.dtype, [&](auto row) {
    return for_matrix(a.values_dtype, [&](auto value) {
      return for_groups(int(a.m), [&](auto groups) {
        using Row = decltype(row);
        using Value = decltype(value);
        constexpr int kGroups = decltype(groups)::value;
        if constexpr (kTwoSets<kGroups>)
          if (sets == 2) return f(apply_small_kernel<Row, Value, kGroups, 2>, std::integral_constant<int, 2>());
        return f(apply_small_kernel<Row, Value, kGroups, 1>, std::integral_constant<int, 1>());
      });
    });
  });
}

}  // namespace timerome
