// Device side of sparse_lowrank_residual for few keys and bfloat16 where multiprocessors form clusters (sm_90 on).
//
// One kernel that reads h once. A cluster takes a group of rows, each of its blocks kSlice of their columns: rows and
// keys of the slice lie in its shared memory, values in its registers, and the residual is made again from them
// whenever it is looked at, which costs less than keeping it. Of the sums that cross slices, each block makes those of
// some rows, its own, and tells all blocks the outcome: scores, which rows pass, c, and what is kept.
//
// Which entries are kept: a sample of a row says between which magnitudes the least that is kept should lie, its
// window; entries above are counted, those inside listed, and the owner finds it among them. If it is not, the window
// moves.
#pragma once
#include "lowrank_kernel.cuh"

namespace timerome {

constexpr int kSlice = kLowrankWarps * 32;  // columns of a block: 32 a warp, of which lane 4 g + q loads 4 g to 4 g + 3
constexpr int kSliceBytes = kSlice * int(sizeof(__nv_bfloat16));
constexpr int kMaxBlocks = 8;               // of a cluster, on any device that has them
constexpr int kMaxTiles = 4;                // of 16 rows: those of a group
constexpr int kListed = 120;                // entries of a row's window that a block can list
constexpr int kListLanes = (kListed + 31) / 32;
constexpr float kDeviations = 4.5f;         // from the expected to the window's ends: one row of 100 000 is beyond
constexpr uint32_t kNone = ~0u;             // above all magnitudes
constexpr uint32_t kEnd = 0x80000000u;      // as an open end

// What a block knows of a group. The first are by row and equal in all blocks.
struct Group {
  uint32_t lo[16 * kMaxTiles], hi[16 * kMaxTiles];  // windows; kNone where nothing is looked for
  uint32_t least[16 * kMaxTiles];                   // magnitude that is kept
  int ties[16 * kMaxTiles];                         // how many of that magnitude are kept; 0: all
  int active[16 * kMaxTiles];
  uint32_t counts[16 * kMaxTiles];  // of this slice: entries above the window, times 2^16, and inside
  int tied[16 * kMaxTiles], tied_before[16 * kMaxTiles];  // of this slice, and of those before it
  uint32_t known_lo[16 * kMaxTiles], known_hi[16 * kMaxTiles];  // of own rows: the least that is kept is in between
  int passes[16 * kMaxTiles];                                   // of own rows
  float row_norm[16 * kMaxTiles], key_norm[kLowrankCudaMaxN];
};

// Where things lie in the shared memory. Sums of the warps' shares, then lists of a window's entries or the sample, lie
// at `work`; the parts of c take the place of sums that are no longer needed.
struct ClusterLayout {
  int rows, shares, own, width, steps;  // shares: warps that share the columns of 16 rows; own: rows of a block
  int keys, coef, group, score, work, parts, bytes;

  __host__ __device__ ClusterLayout(int tiles, int blocks, int n, int m)
      : rows(16 * tiles), shares(kLowrankWarps / tiles), own((rows + blocks - 1) / blocks), width(score_columns(n)),
        steps(up_to(m, 16) / 16) {
    const int parts_bytes = tiles * steps * 3 * 512, sample = own * blocks * (kSlice / 4) * 2;
    keys = 2 * rows * kSliceBytes;
    coef = keys + width * kSliceBytes;
    group = coef + up_to(n * m * 4, 16);
    score = group + up_to(int(sizeof(Group)), 16);
    work = score + own * width * 4;
    const int all_sums = (first_sums() + (shares - 1) * rows * width) * 4;
    const int lists = larger(larger(rows * kListed * 4, sample), up_to(first_sums() * 4, 16));
    const int both = larger(up_to(all_sums, 16), lists + parts_bytes);
    parts = work + both - parts_bytes;
    bytes = work + both;
  }
  // The first share's sums, in which all are added up, then all shares' squares of rows, then those of the keys.
  __host__ __device__ int first_sums() const { return rows * width + shares * rows + width; }
  static __host__ __device__ int larger(int a, int b) { return a > b ? a : b; }
};

struct alignas(16) Chunk {
  Quad<__nv_bfloat16> quad[2];
};

// A row's 16 bytes in a slice: neighbouring rows change halves of 128 bytes, so that a warp's readings meet in no bank.
__device__ __forceinline__ int chunk_at(int row, int chunk) {
  return row * kSliceBytes + (chunk ^ (row & 1) << 2) * 16;
}

// Residual of 16 rows in kCount of every four columns: r[j] holds, of row g, the columns 8 q + j and 8 q + 4 + j of the
// warp's, then of row g + 8.
template <int kCount>
__device__ __forceinline__ void residual_of(float (&r)[kCount][4], const uint4* parts, int steps,
                                            const Parts<1> (&value)[4][4]) {
#pragma unroll
  for (int j = 0; j < kCount; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) r[j][i] = 0.0f;
#pragma unroll
  for (int l = 0; l < 4; l++)
    if (l < steps) {
      Parts<3> lower, upper;
#pragma unroll
      for (int p = 0; p < 3; p++) {
        const uint4 word = parts[(l * 3 + p) * 32];
        lower.pair[p][0] = word.x, upper.pair[p][0] = word.y, lower.pair[p][1] = word.z, upper.pair[p][1] = word.w;
      }
#pragma unroll
      for (int j = 0; j < kCount; j++) multiply_add(r[j], lower, upper, value[l][j]);
    }
}

// How many halves of a warp's words, as bfloat16s, are at least so much.
template <int kWords>
__device__ __forceinline__ int halves_reaching(const uint32_t (&word)[kWords], uint32_t least) {
  const uint32_t both = least << 16 | least;
  uint32_t sum = 0;  // of masks, each half a -1
#pragma unroll
  for (int i = 0; i < kWords; i++)
    sum += __hge2_mask(reinterpret_cast<const __nv_bfloat162&>(word[i]), reinterpret_cast<const __nv_bfloat162&>(both));
  const uint32_t lower = (0u - sum) & 0xffff, upper = (lower - ((sum + lower) >> 16)) & 0xffff;
  return __reduce_add_sync(~0u, int(lower + upper));
}

// Sum over the lanes of a quad up to this one.
__device__ __forceinline__ uint32_t quad_inclusive_scan(uint32_t x) {
  const int q = threadIdx.x & 3;
  const uint32_t one = __shfl_up_sync(~0u, x, 1);
  x += q >= 1 ? one : 0;
  const uint32_t two = __shfl_up_sync(~0u, x, 2);
  return x + (q >= 2 ? two : 0);
}

template <int kRowParts>
__global__ void __launch_bounds__(kLowrankThreads, 1) lowrank_cluster_kernel(const LowrankCuda a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  using Row = __nv_bfloat16;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, q = lane & 3;
  const int n = int(a.n), m = int(a.m), d = int(a.d), k = int(a.k), blocks = a.blocks, tiles = a.tiles;
  const int rank = cluster_rank(), column0 = rank * kSlice, slice = min(kSlice, d - column0);
  const bool has_columns = warp * 32 < slice, in_place = a.out == a.h, selects = k < d;
  const ClusterLayout at(tiles, blocks, n, m);
  const int rows = at.rows, width = at.width, shares = at.shares, steps = at.steps;
  const int own0 = rank * at.own, own = max(0, min(at.own, rows - own0));  // own rows
  char* const memory = dynamic_shared<char>();
  Group& group = *reinterpret_cast<Group*>(memory + at.group);
  float* const coef = reinterpret_cast<float*>(memory + at.coef);
  float* const score = reinterpret_cast<float*>(memory + at.score);
  float* const sums = reinterpret_cast<float*>(memory + at.work);
  float* const row_squares = sums + rows * width;
  float* const key_squares = row_squares + shares * rows;
  uint32_t* const lists = reinterpret_cast<uint32_t*>(memory + at.work);
  uint32_t* const sample = lists;
  int* const warp_ties = reinterpret_cast<int*>(lists);
  uint32_t* const parts = reinterpret_cast<uint32_t*>(memory + at.parts);
  const auto tell = [&](auto& place, auto what) {  // all blocks, by a warp
    if (lane < blocks) *of_block(&place, lane) = what;
  };

  // --- Keys and coefficients once, rows of a group while the one before is edited.
  const int chunk = threadIdx.x % (kSliceBytes / 16), fetch_row = threadIdx.x / (kSliceBytes / 16);
  constexpr int kFetchRows = kLowrankThreads / (kSliceBytes / 16);
  const bool has_chunk = chunk * 8 < slice;
  const Row* const h = static_cast<const Row*>(a.h);
  const int64_t groups = (a.rows + rows - 1) / rows, clusters = gridDim.x / blocks;
  const auto fetch = [&](char* buffer, int64_t which) {
    const int64_t row0 = which * rows;
    for (int row = fetch_row; row < rows && which < groups; row += kFetchRows) {
      const bool valid = has_chunk && row0 + row < a.rows && !(in_place && a.mask && !a.mask[row0 + row]);
      copy_async(buffer + chunk_at(row, chunk), valid ? h + (row0 + row) * a.d + column0 + chunk * 8 : h, valid);
    }
  };
  for (int key = fetch_row; key < width; key += kFetchRows) {
    const bool valid = has_chunk && key < n;
    copy_async(memory + at.keys + chunk_at(key, chunk),
               static_cast<const Row*>(a.keys) + (valid ? key * a.d + column0 + chunk * 8 : 0), valid);
  }
  fetch(memory, blockIdx.x / blocks);
  copy_async_commit();
  for (int i = threadIdx.x; i < n * m; i += kLowrankThreads) coef[i] = a.coef[i];
  if (threadIdx.x < 16 * kMaxTiles) group.active[threadIdx.x] = 0, group.lo[threadIdx.x] = kNone;
  Parts<1> value[4][4];
  bool has_values = false, has_key_norms = false;

  int turn = 0;
  for (int64_t which = blockIdx.x / blocks; which < groups; which += clusters, turn ^= 1) {
    const int64_t row0 = which * rows;
    char* const buffer = memory + turn * rows * kSliceBytes;
    fetch(memory + (turn ^ 1) * rows * kSliceBytes, which + clusters);
    copy_async_commit();
    copy_async_wait(1);
    __syncthreads();

    // --- Scores of this slice: a warp takes 16 rows and every shares-th 32 columns.
    {
      const int tile = warp % tiles, share = warp / tiles;
      const char* const own_rows = buffer + tile * 16 * kSliceBytes;
      float sum[kTiles][4] = {}, row_square[2] = {};
      for (int piece = share; piece * 32 < slice; piece += shares) {
        Parts<kRowParts> part[2][2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const Chunk rows_of = reinterpret_cast<const Chunk&>(own_rows[chunk_at(g + 8 * i, 4 * piece + q)]);
#pragma unroll
          for (int step = 0; step < 2; step++) {
            Quad<float> x = to_floats(rows_of.quad[step]);
            if (kRowParts > 1) {
              const Quad<float> mean =
                  reinterpret_cast<const Quad<float>&>(a.mean[column0 + piece * 32 + 8 * q + 4 * step]);
#pragma unroll
              for (int j = 0; j < 4; j++) x.e[j] -= mean.e[j];
              part[step][i] = split<kRowParts>(x);
            } else {
              part[step][i] = parts_of<kRowParts>(rows_of.quad[step]);
            }
            if (a.gated)
#pragma unroll
              for (int j = 0; j < 4; j++) row_square[i] += x.e[j] * x.e[j];
          }
        }
#pragma unroll
        for (int t = 0; t < kTiles; t++) {
          if (t * 8 >= n) break;
          const Chunk key = reinterpret_cast<const Chunk&>(memory[at.keys + chunk_at(t * 8 + g, 4 * piece + q)]);
          float some[4] = {};
#pragma unroll
          for (int step = 0; step < 2; step++)
            multiply_add(some, part[step][0], part[step][1], parts_of<1>(key.quad[step]));
#pragma unroll
          for (int i = 0; i < 4; i++) sum[t][i] += some[i];
        }
      }
      float* const table = share == 0 ? sums : key_squares + width + (share - 1) * rows * width;
#pragma unroll
      for (int t = 0; t < kTiles; t++) {
        if (t * 8 >= n) break;
#pragma unroll
        for (int i = 0; i < 4; i++) table[(tile * 16 + g + i / 2 * 8) * width + t * 8 + 2 * q + i % 2] = sum[t][i];
      }
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const float square = quad_sum(row_square[i]);
        if (q == 0) row_squares[share * rows + tile * 16 + g + 8 * i] = square;
      }
      if (a.gated && !has_key_norms)
        for (int key = warp; key < m; key += kLowrankWarps) {
          float square = 0;
          for (int c = lane; c < kSliceBytes / 16; c += 32) {
            const Chunk x = reinterpret_cast<const Chunk&>(memory[at.keys + chunk_at(key, c)]);
#pragma unroll
            for (int e = 0; e < 8; e++) square += to_float(x.quad[e / 4].e[e % 4]) * to_float(x.quad[e / 4].e[e % 4]);
          }
          square = warp_sum(square);
          if (lane == 0) key_squares[key] = square;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < rows * width; i += kLowrankThreads)
      for (int share = 1; share < shares; share++) sums[i] += key_squares[width + (share - 1) * rows * width + i];
    if (threadIdx.x < rows)
      for (int share = 1; share < shares; share++) row_squares[threadIdx.x] += row_squares[share * rows + threadIdx.x];
    cluster_sync();

    // --- Own rows: scores over all slices, which rows pass, c.
    const auto over_blocks = [&](const float* table) {
      float sum = 0;
#pragma unroll
      for (int b = 0; b < kMaxBlocks; b++)
        if (b < blocks) sum += *of_block(table, b);
      return sum;
    };
    for (int i = threadIdx.x; i < own * width; i += kLowrankThreads) score[i] = over_blocks(sums + own0 * width + i);
    if (a.gated) {
      if (threadIdx.x < own) group.row_norm[threadIdx.x] = sqrtf(over_blocks(row_squares + own0 + threadIdx.x));
      if (!has_key_norms && threadIdx.x < m) group.key_norm[threadIdx.x] = sqrtf(over_blocks(key_squares + threadIdx.x));
      has_key_norms = true;
    }
    __syncthreads();
    for (int i = warp; i < own; i += kLowrankWarps) {
      const int64_t row = row0 + own0 + i;
      bool passes = row < a.rows && (!a.mask || a.mask[row]);
      if (passes && a.gated) {
        bool near = false;  // 0 / 0 and NaN reach nothing
        for (int j = lane; j < m; j += 32)
          near = near || score[i * width + j] / (group.row_norm[i] * group.key_norm[j]) >= a.tau;
        passes = __ballot_sync(~0u, near);
      }
      tell(group.active[own0 + i], int(passes));
      if (lane == 0) {
        group.passes[i] = passes, group.known_lo[i] = 0, group.known_hi[i] = kEnd;
        if (passes) atomicAdd(a.hits + row / a.length, 1ull);
      }
    }
    __syncthreads();
    const int pairs = steps * 8;
    for (int i = threadIdx.x; i < own * pairs; i += kLowrankThreads) {
      const int j = i % pairs * 2, row = own0 + i / pairs;
      if (!group.passes[i / pairs]) continue;
      float c[2] = {};
      const float* const s = score + i / pairs * width;
#pragma unroll 8
      for (int l = 0; l < n; l++)
#pragma unroll
        for (int e = 0; e < 2; e++)
          if (j + e < m) c[e] += s[l] * coef[l * m + j + e];
      const Parts<3> of = split<3>({c[0], c[1], 0.0f, 0.0f});
      // What one lane takes lies side by side: rows g and g + 8 of the columns 2 q and 2 q + 1, then of those 8 on.
      const int first = (row / 16 * steps + j / 16) * 3 * 128 + (row % 8 * 4 + j % 8 / 2) * 4 + row % 16 / 8 + j % 16 / 8 * 2;
#pragma unroll
      for (int p = 0; p < 3; p++)
        for (int b = 0; b < blocks; b++) of_block(parts, b)[first + p * 128] = of.pair[p][0];
    }
    cluster_sync();

    const auto rows_where = [&](auto f) {  // of the group, as bits
      return uint64_t(__ballot_sync(~0u, lane + 32 < rows && f(lane + 32))) << 32 | __ballot_sync(~0u, lane < rows && f(lane));
    };
    const uint64_t active = rows_where([&](int row) { return group.active[row] != 0; });
    const auto of_tile = [](uint64_t some, int tile) { return uint32_t(some >> 16 * tile) & 0xffffu; };
    const auto parts_of_tile = [&](int tile) { return reinterpret_cast<const uint4*>(parts) + tile * steps * 3 * 32 + lane; };
    bool any_ties = false;
    if (active) {
      if (!has_values && has_columns) {
        // Values past the last are read as the last: their c is zero.
        const Row* const from = static_cast<const Row*>(a.values) + column0 + warp * 32 + 4 * g;
#pragma unroll
        for (int l = 0; l < 4; l++)
          if (l < steps) {
            Quad<Row> of[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
              of[i] = reinterpret_cast<const Quad<Row>&>(from[min(l * 16 + 2 * q + (i & 1) + (i & 2) * 4, m - 1) * a.d]);
#pragma unroll
            for (int j = 0; j < 2; j++) {
              const Columns<1> two = columns(of, j);
              value[l][2 * j] = two.lower, value[l][2 * j + 1] = two.upper;
            }
          }
      }
      has_values = true;
    }

    if (active && selects) {
      // --- A sample, every fourth column, to the rows' owners, who choose windows by it.
      const int words = d / 8;
      if (has_columns)
        for (int tile = 0; tile < tiles; tile++) {
          if (!of_tile(active, tile)) continue;
          float r[1][4];
          residual_of(r, parts_of_tile(tile), steps, value);
#pragma unroll
          for (int i = 0; i < 2; i++) {
            const int row = tile * 16 + g + 8 * i, owner = row / at.own;
            of_block(sample, owner)[(row - owner * at.own) * words + rank * (kSlice / 8) + warp * 4 + q] =
                magnitude(r[0][2 * i]) >> 16 | (magnitude(r[0][2 * i + 1]) & 0xffff0000u);
          }
        }
      if (threadIdx.x < rows) group.counts[threadIdx.x] = 0;
      cluster_sync();
      for (int i = warp; i < 2 * own; i += kLowrankWarps) {  // the lower ends and the upper ones
        const int row = i / 2;
        if (!group.passes[row]) continue;
        uint32_t word[kMaxBlocks * kSlice / 8 / 32];
#pragma unroll
        for (int w = 0; w < kMaxBlocks * kSlice / 8 / 32; w++)
          word[w] = w * 32 + lane < words ? sample[row * words + w * 32 + lane] : 0;
        const float expected = float(k) / 4;
        const float spread = 1 + kDeviations * sqrtf(expected * (1 - float(k) / float(d)) * 0.75f);
        const bool upper = i % 2;
        const int wanted = int(upper ? ceilf(expected - spread) : ceilf(expected + spread));
        constexpr uint32_t kLast = 4;  // finer than so much it need not be
        uint32_t of = 0;  // the largest that as many reach as are wanted
        for (uint32_t bit = 1 << 14; bit >= kLast; bit /= 2)
          if (halves_reaching(word, of | bit) >= wanted) of |= bit;
        if (upper)
          tell(group.hi[own0 + row], wanted < 1 ? kEnd : (of + kLast) << 16);
        else
          tell(group.lo[own0 + row], of << 16);
      }
      cluster_sync();

      for (uint64_t open; (open = rows_where([&](int row) { return group.lo[row] != kNone; }));) {
        // --- Entries of this slice above and inside the windows.
        if (has_columns)
          for (int tile = 0; tile < tiles; tile++) {
            if (!of_tile(open, tile)) continue;
            float r[4][4];
            residual_of(r, parts_of_tile(tile), steps, value);
#pragma unroll
            for (int i = 0; i < 2; i++) {
              const int row = tile * 16 + g + 8 * i;
              const uint32_t lo = group.lo[row], hi = group.hi[row];
              uint32_t count = 0;
#pragma unroll
              for (int e = 0; e < 8; e++) {
                const uint32_t x = magnitude(r[e % 4][2 * i + e / 4]);
                count += x >= hi ? 1u << 16 : x >= lo ? 1u : 0u;
              }
              const uint32_t sum = quad_inclusive_scan(count);
              uint32_t base = 0;
              if (q == 3) base = atomicAdd(&group.counts[row], sum);
              base = __shfl_sync(~0u, base, lane | 3);
              int place = int((base + sum - count) & 0xffffu);
#pragma unroll
              for (int e = 0; e < 8; e++) {
                const uint32_t x = magnitude(r[e % 4][2 * i + e / 4]);
                if (x >= lo && x < hi) {
                  if (place < kListed) lists[row * kListed + place] = x;
                  place++;
                }
              }
            }
          }
        cluster_sync();
        // --- Own rows: the least that is kept, or the next window.
        for (int i = warp; i < own; i += kLowrankWarps) {
          const int row = own0 + i;
          const uint32_t lo = group.lo[row], hi = group.hi[row];
          if (lo == kNone) continue;
          const uint32_t of_slice = lane < blocks ? of_block(group.counts, lane)[row] : 0;
          const int slice_inside = int(of_slice & 0xffffu);
          const int above = __reduce_add_sync(~0u, int(of_slice >> 16)), inside = __reduce_add_sync(~0u, slice_inside);
          const bool fits = !__ballot_sync(~0u, slice_inside > kListed);
          uint32_t known_lo = group.known_lo[i], known_hi = group.known_hi[i], next_lo = kNone, next_hi = kNone;
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
          } else if (!fits) {
            known_lo = lo, known_hi = next_hi = hi, next_lo = lo + (hi - lo) / 2;
          } else {
            uint32_t list[kMaxBlocks][kListLanes];
#pragma unroll
            for (int b = 0; b < kMaxBlocks; b++) {
              const int count = __shfl_sync(~0u, slice_inside, b);
#pragma unroll
              for (int l = 0; l < kListLanes; l++)
                list[b][l] = l * 32 + lane < count ? of_block(lists, b)[row * kListed + l * 32 + lane] : 0;
            }
            const auto reaching = [&](uint32_t x) {
              int count = 0;
#pragma unroll
              for (int b = 0; b < kMaxBlocks; b++)
#pragma unroll
                for (int l = 0; l < kListLanes; l++) count += list[b][l] >= x;
              return __reduce_add_sync(~0u, count);
            };
            const int need = k - above;
            const Bracket of = rank_of(reaching, inside, need, lo, hi);
            least = of.lo;
            if (of.lo < of.hi) ties = need - reaching(of.hi);
          }
          __syncwarp();  // all lanes have read what is told now
          tell(group.lo[row], next_lo);
          tell(group.hi[row], next_hi);
          tell(group.least[row], max(least, 1u));  // to add zero changes nothing
          tell(group.ties[row], least ? ties : 0);
          if (lane == 0) group.known_lo[i] = known_lo, group.known_hi[i] = known_hi;
        }
        cluster_sync();
        if (threadIdx.x < rows) group.counts[threadIdx.x] = 0;
        __syncthreads();
      }

      // --- Where not all entries of the least magnitude are kept, those of the first columns are.
      const uint64_t with_ties = rows_where([&](int row) { return group.active[row] && group.ties[row]; });
      any_ties = with_ties;
      if (any_ties) {
        for (int tile = 0; tile < tiles; tile++) {
          if (!of_tile(with_ties, tile)) continue;
          float r[4][4] = {};
          if (has_columns) residual_of(r, parts_of_tile(tile), steps, value);
#pragma unroll
          for (int i = 0; i < 2; i++) {
            const int row = tile * 16 + g + 8 * i;
            uint32_t count = 0;
#pragma unroll
            for (int e = 0; e < 8; e++) count += magnitude(r[e % 4][2 * i + e / 4]) == group.least[row];
            const uint32_t sum = quad_inclusive_scan(count);
            if (q == 3) warp_ties[row * kLowrankWarps + warp] = int(sum);
          }
        }
        __syncthreads();
        if (threadIdx.x < rows) {
          int sum = 0;
          for (int w = 0; w < kLowrankWarps; w++) {
            int& place = warp_ties[threadIdx.x * kLowrankWarps + w];
            const int count = place;
            place = sum, sum += count;
          }
          group.tied[threadIdx.x] = sum;
        }
        cluster_sync();
        if (threadIdx.x < rows) {
          int before = 0;
          for (int b = 0; b < rank; b++) before += of_block(group.tied, b)[threadIdx.x];
          group.tied_before[threadIdx.x] = before;
        }
        cluster_sync();
      }
    }

    // --- Out: a warp its columns of all rows.
    if (has_columns)
      for (int tile = 0; tile < tiles; tile++) {
        const uint32_t here = of_tile(active, tile);
        if (!here && in_place) continue;
        float r[4][4] = {};
        if (here) residual_of(r, parts_of_tile(tile), steps, value);
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int row = tile * 16 + g + 8 * i;
          const bool edits = here >> (row % 16) & 1;
          const uint32_t least = selects ? group.least[row] : 0;
          if (any_ties) {
            uint32_t count = 0;
#pragma unroll
            for (int e = 0; e < 8; e++) count += magnitude(r[e % 4][2 * i + e / 4]) == least;
            int before = int(quad_inclusive_scan(count) - count);
            const int ties = group.ties[row];
            if (edits && ties) {
              before += group.tied_before[row] + warp_ties[row * kLowrankWarps + warp];
#pragma unroll
              for (int e = 0; e < 8; e++) {
                float& x = r[e % 4][2 * i + e / 4];
                if (magnitude(x) == least && before++ >= ties) x = 0.0f;
              }
            }
          }
          if (row0 + row >= a.rows || (in_place && !edits)) continue;
          Chunk x = reinterpret_cast<const Chunk&>(buffer[chunk_at(row, 4 * warp + q)]);
          if (edits)
#pragma unroll
            for (int odd = 0; odd < 2; odd++)
              x.quad[odd] = add_kept(x.quad[odd], {r[0][2 * i + odd], r[1][2 * i + odd], r[2][2 * i + odd], r[3][2 * i + odd]},
                                     least, a.alpha);
          Row* const to = static_cast<Row*>(a.out) + (row0 + row) * a.d + column0 + warp * 32 + 8 * q;
          reinterpret_cast<Chunk&>(*to) = x;
        }
      }
    __syncthreads();  // the next rows but one take this buffer
  }
#endif
}

}  // namespace timerome
