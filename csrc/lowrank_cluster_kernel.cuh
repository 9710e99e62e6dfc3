// Device side of sparse_lowrank_residual for few keys and bfloat16 where multiprocessors form clusters (sm_90 on).
//
// One kernel that reads h once. A cluster takes a group of rows, each of its blocks kSlice of their columns: rows and
// keys of the slice lie in its shared memory, the residual in its registers. Of the sums that cross slices, each block
// makes those of some rows, its own, and tells all blocks the outcome: scores, which rows pass, c, and what is kept. Two
// blocks share a multiprocessor, so that one works while the other waits for its cluster.
//
// Which entries are kept: a sample of a row says between which magnitudes the least that is kept should lie, its
// window; entries above are counted, those inside listed, and the owner finds it among them. If it is not, the window
// moves.
#pragma once
#include "lowrank_kernel.cuh"

namespace timerome {

constexpr int kClusterThreads = 256;
constexpr int kClusterWarps = kClusterThreads / 32;
constexpr int kPieces = 2;                              // of 32 columns: those of a warp
constexpr int kSlice = kClusterWarps * kPieces * 32;    // columns of a block
constexpr int kSliceBytes = kSlice * int(sizeof(__nv_bfloat16));
constexpr int kMaxBlocks = 8;  // of a cluster, on any device that has them
constexpr int kMaxTiles = 2;   // of 16 rows: those of a group
constexpr int kMaxRows = 16 * kMaxTiles;
constexpr int kListed = 96;            // entries of a row's window that a block can list
constexpr int kListWords = 16;         // and a lane of all blocks' lists
constexpr float kDeviations = 4.5f;    // from the expected to the window's ends: one row of 100 000 is beyond
constexpr uint32_t kNone = ~0u;        // above all magnitudes
constexpr uint32_t kEnd = 0x80000000u; // as an open end

// What a block knows of a group. The first are by row and equal in all blocks.
struct Group {
  uint32_t lo[kMaxRows], hi[kMaxRows];  // windows; kNone where nothing is looked for
  uint32_t least[kMaxRows];             // magnitude that is kept
  int ties[kMaxRows];                   // how many of that magnitude are kept; 0: all
  int active[kMaxRows];
  uint32_t counts[kMaxRows];                          // of this slice: entries above the window, times 2^16, and inside
  int tied[kMaxRows], tied_before[kMaxRows];          // of this slice, and of those before it
  uint32_t known_lo[kMaxRows], known_hi[kMaxRows];    // of own rows: the least that is kept is in between
  int passes[kMaxRows];                               // of own rows
  float key_norm[kLowrankCudaMaxN];
  float row_squares[kMaxBlocks][kMaxRows], key_squares[kMaxBlocks][kLowrankCudaMaxN];  // from each block, of own rows
};

// Where things lie in the shared memory. At `told` lie sums from each block of own rows, then c of these, or at last a
// list. At `work` lie sums of the warps' shares, or the sample or lists, and parts of c, in whose place sums were.
struct ClusterLayout {
  int rows, shares, own, width;  // shares: warps that share the columns of 16 rows; own: rows of a block
  int keys, coef, group, told, c, work, parts, bytes;

  __host__ __device__ ClusterLayout(int tiles, int blocks, int n, int m, int steps)
      : rows(16 * tiles), shares(kClusterWarps / tiles), own(up_to((rows + blocks - 1) / blocks, 2)),
        width(score_columns(n)) {
    const int parts_bytes = tiles * steps * 3 * 512, sums = shares * rows * (width + 1) * 4;
    const int sample = own * blocks * (kSlice / 4) * 2, lists = rows * kListed * 4;
    keys = rows * kSliceBytes;
    coef = keys + width * kSliceBytes;
    group = coef + up_to(n * m * 4, 16);
    told = group + up_to(int(sizeof(Group)), 16);
    c = told + blocks * own * width * 4;
    work = told + larger(c - told + own * steps * 16 * 4, own * list_size(blocks) * 4);
    const int both = larger(up_to(sums, 16), up_to(larger(lists, sample), 16) + parts_bytes);
    parts = work + both - parts_bytes;
    bytes = work + both;
  }
  static __host__ __device__ int list_size(int blocks) {
    return blocks * kListed < kListWords * 32 ? blocks * kListed : kListWords * 32;
  }
  static __host__ __device__ int larger(int a, int b) { return a > b ? a : b; }
};

struct alignas(16) Chunk {
  Quad<__nv_bfloat16> quad[2];
};

// A row's 16 bytes in a slice: pairs of rows change halves of 128 bytes, so that a warp's readings meet in no bank.
__device__ __forceinline__ int chunk_at(int row, int chunk) {
  return row * kSliceBytes + (chunk ^ (row & 2) << 1) * 16;
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

// The residual of 16 rows that a lane of a warp holds: of the columns 8 q + j and 8 q + 4 + j of a piece those of row
// 2 g, then of row 2 g + 1.
using Residual = float[kPieces][4][4];

// Which of a lane's entries of one of its two rows are at least so much: a bit for each, for the entry e of a piece
// (column 8 q + e) this one.
__device__ __forceinline__ uint32_t bit_of(int piece, int e) {
  return 1u << (e % 2 * 16 + piece * 4 + e / 2);
}
__device__ __forceinline__ uint32_t bits_reaching(const Residual& r, int row, uint32_t least) {
  uint32_t bits = 0;
#pragma unroll
  for (int piece = 0; piece < kPieces; piece++)
#pragma unroll
    for (int e = 0; e < 8; e++)
      if (magnitude(r[piece][e % 4][2 * row + e / 4]) >= least) bits |= bit_of(piece, e);
  return bits;
}
// The same, two entries at once, where `least` is a bfloat16.
__device__ __forceinline__ uint32_t bits_reaching_half(const Residual& r, int row, uint32_t least) {
  const uint32_t both = __byte_perm(least, least, 0x3232);
  uint32_t bits = 0;
#pragma unroll
  for (int piece = 0; piece < kPieces; piece++)
#pragma unroll
    for (int e = 0; e < 8; e += 2) {
      const uint32_t word = __byte_perm(__float_as_uint(r[piece][e % 4][2 * row + e / 4]),
                                        __float_as_uint(r[piece][e % 4 + 1][2 * row + e / 4]), 0x7632) & 0x7fff7fffu;
      bits |= __hgeu2_mask(reinterpret_cast<const __nv_bfloat162&>(word), reinterpret_cast<const __nv_bfloat162&>(both)) &
              (bit_of(piece, e) | bit_of(piece, e + 1));
    }
  return bits;
}

template <int kRowParts, int kKeyTiles>
__global__ void __launch_bounds__(kClusterThreads, 2) lowrank_cluster_kernel(const LowrankCuda a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  using Row = __nv_bfloat16;
  constexpr int kSteps = (kKeyTiles + 1) / 2;  // of 16 values
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, q = lane & 3;
  const int n = int(a.n), m = int(a.m), d = int(a.d), k = int(a.k), blocks = a.blocks, tiles = a.tiles;
  const int rank = cluster_rank(), column0 = rank * kSlice, slice = min(kSlice, d - column0);
  const bool in_place = a.out == a.h, selects = k < d;
  const ClusterLayout at(tiles, blocks, n, m, kSteps);
  const int rows = at.rows, width = at.width, shares = at.shares;
  const int own0 = rank * at.own, own = max(0, min(at.own, rows - own0));  // own rows
  char* const memory = dynamic_shared<char>();
  Group& group = *reinterpret_cast<Group*>(memory + at.group);
  float* const coef = reinterpret_cast<float*>(memory + at.coef);
  float* const told = reinterpret_cast<float*>(memory + at.told);
  float* const own_c = reinterpret_cast<float*>(memory + at.c);
  float* const sums = reinterpret_cast<float*>(memory + at.work);
  float* const square_sums = sums + shares * rows * width;
  uint32_t* const lists = reinterpret_cast<uint32_t*>(memory + at.work);
  uint32_t* const sample = lists;
  int* const piece_ties = reinterpret_cast<int*>(lists);
  uint4* const parts = reinterpret_cast<uint4*>(memory + at.parts);
  const auto tell = [&](auto& place, auto what) {  // all blocks, by a warp
    if (lane < blocks) *of_block(&place, lane) = what;
  };
  const auto has = [&](int piece) { return (warp * kPieces + piece) * 32 < slice; };

  // --- Keys and coefficients once, rows of a group as soon as the one before is done.
  const int chunk = threadIdx.x % (kSliceBytes / 16), fetch_row = threadIdx.x / (kSliceBytes / 16);
  constexpr int kFetchRows = kClusterThreads / (kSliceBytes / 16);
  const bool has_chunk = chunk * 8 < slice;
  const Row* const h = static_cast<const Row*>(a.h);
  const int64_t groups = (a.rows + rows - 1) / rows, clusters = gridDim.x / blocks;
  const auto fetch = [&](int64_t which) {
    const int64_t row0 = which * rows;
#pragma unroll 4
    for (int row = fetch_row; row < rows && which < groups; row += kFetchRows) {
      const bool valid = has_chunk && row0 + row < a.rows && !(in_place && a.mask && !a.mask[row0 + row]);
      copy_async(memory + chunk_at(row, chunk), valid ? h + (row0 + row) * a.d + column0 + chunk * 8 : h, valid);
    }
    copy_async_commit();
  };
  fetch(blockIdx.x / blocks);
  for (int key = fetch_row; key < width; key += kFetchRows) {
    const bool valid = has_chunk && key < n;
    copy_async(memory + at.keys + chunk_at(key, chunk),
               static_cast<const Row*>(a.keys) + (valid ? key * a.d + column0 + chunk * 8 : 0), valid);
  }
  copy_async_commit();
  for (int i = threadIdx.x; i < n * m; i += kClusterThreads) coef[i] = a.coef[i];
  bool has_key_norms = !a.gated;

  for (int64_t which = blockIdx.x / blocks; which < groups; which += clusters) {
    const int64_t row0 = which * rows;
    copy_async_wait(0);
    __syncthreads();

    // --- Scores of this slice: a warp takes 16 rows and every shares-th 32 columns.
    {
      const int tile = warp % tiles, share = warp / tiles;
      const char* const own_rows = memory + tile * 16 * kSliceBytes;
      float sum[kKeyTiles][4] = {}, row_square[2] = {};
      for (int piece = share; piece * 32 < slice; piece += shares) {
        Parts<kRowParts> part[2][2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const Chunk rows_of = reinterpret_cast<const Chunk&>(own_rows[chunk_at(2 * g + i, 4 * piece + q)]);
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
        for (int t = 0; t < kKeyTiles; t++) {
          const int key_row = min(t * 8 + g, width - 1);  // what is read twice is not used
          const Chunk key = reinterpret_cast<const Chunk&>(memory[at.keys + chunk_at(key_row, 4 * piece + q)]);
          float some[4] = {};
#pragma unroll
          for (int step = 0; step < 2; step++)
            multiply_add(some, part[step][0], part[step][1], parts_of<1>(key.quad[step]));
#pragma unroll
          for (int i = 0; i < 4; i++) sum[t][i] += some[i];
        }
      }
      float* const table = sums + (share * rows + tile * 16) * width;
#pragma unroll
      for (int t = 0; t < kKeyTiles; t++)
        if (t * 8 < width)
#pragma unroll
          for (int i = 0; i < 4; i++) table[(2 * g + i / 2) * width + t * 8 + 2 * q + i % 2] = sum[t][i];
      if (a.gated)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const float square = quad_sum(row_square[i]);
          if (q == 0) square_sums[share * rows + tile * 16 + 2 * g + i] = square;
        }
      if (!has_key_norms)
        for (int key = warp; key < m; key += kClusterWarps) {
          float square = 0;
#pragma unroll
          for (int c = lane; c < kSliceBytes / 16; c += 32) {
            const Chunk x = reinterpret_cast<const Chunk&>(memory[at.keys + chunk_at(key, c)]);
#pragma unroll
            for (int e = 0; e < 8; e++) square += to_float(x.quad[e / 4].e[e % 4]) * to_float(x.quad[e / 4].e[e % 4]);
          }
          square = warp_sum(square);
          if (lane < blocks) of_block(&group, lane)->key_squares[rank][key] = square;
        }
    }
    __syncthreads();
    const auto over_shares = [&](const float* table, int size, int i) {
      float sum = 0;
#pragma unroll
      for (int share = 0; share < kClusterWarps; share++)
        if (share < shares) sum += table[share * size + i];
      return sum;
    };
    for (int i = threadIdx.x; i < rows * width; i += kClusterThreads) {
      const int owner = i / (at.own * width);
      of_block(told, owner)[(rank * at.own - owner * at.own) * width + i] = over_shares(sums, rows * width, i);
    }
    if (a.gated && threadIdx.x < rows) {
      const int owner = threadIdx.x / at.own;
      of_block(&group, owner)->row_squares[rank][threadIdx.x - owner * at.own] =
          over_shares(square_sums, rows, threadIdx.x);
    }
    cluster_sync();

    // --- Own rows: scores over all slices, which rows pass, c.
    const auto over_blocks = [&](const float* table, int size, int i) {
      float sum = 0;
#pragma unroll
      for (int b = 0; b < kMaxBlocks; b++)
        if (b < blocks) sum += table[b * size + i];
      return sum;
    };
    // In the first block's place; each is read by the thread alone that writes it.
    for (int i = threadIdx.x; i < own * width; i += kClusterThreads) told[i] = over_blocks(told, at.own * width, i);
    if (!has_key_norms && threadIdx.x < m)
      group.key_norm[threadIdx.x] = sqrtf(over_blocks(group.key_squares[0], kLowrankCudaMaxN, threadIdx.x));
    has_key_norms = true;
    __syncthreads();
    for (int i = warp; i < own; i += kClusterWarps) {
      const int64_t row = row0 + own0 + i;
      bool passes = row < a.rows && (!a.mask || a.mask[row]);
      if (passes && a.gated) {
        const float row_norm = sqrtf(over_blocks(group.row_squares[0], kMaxRows, i));
        bool near = false;  // 0 / 0 and NaN reach nothing
        for (int j = lane; j < m; j += 32) near = near || told[i * width + j] / (row_norm * group.key_norm[j]) >= a.tau;
        passes = __ballot_sync(~0u, near);
      }
      tell(group.active[own0 + i], int(passes));
      tell(group.lo[own0 + i], kNone);
      if (lane == 0) {
        group.passes[i] = passes, group.known_lo[i] = 0, group.known_hi[i] = kEnd;
        if (passes) atomicAdd(a.hits + row / a.length, 1ull);
      }
    }
    for (int i = threadIdx.x; i < own * kSteps * 16; i += kClusterThreads) {
      const int j = i % (kSteps * 16), row = i / (kSteps * 16);
      float c = 0;
      if (j < m)
#pragma unroll 8
        for (int l = 0; l < n; l++) c += told[row * width + l] * coef[l * m + j];
      own_c[i] = c;
    }
    __syncthreads();
    // As the tensor cores take them: of two rows the columns 2 q and 2 q + 1, then those 8 on.
    for (int i = threadIdx.x; i < own / 2 * kSteps * 4 * blocks; i += kClusterThreads) {
      const int pair = i / (kSteps * 4 * blocks), l = i / (4 * blocks) % kSteps, of_q = i / blocks % 4;
      const int row = own0 + 2 * pair;
      const float* const c = own_c + 2 * pair * kSteps * 16 + l * 16 + 2 * of_q;
      Parts<3> two[2];
#pragma unroll
      for (int odd = 0; odd < 2; odd++) {
        const float* const of = c + odd * kSteps * 16;
        two[odd] = split<3>({of[0], of[1], of[8], of[9]});
      }
      if (group.passes[2 * pair] || group.passes[2 * pair + 1])
#pragma unroll
        for (int p = 0; p < 3; p++)
          of_block(parts, i % blocks)[((row / 16 * kSteps + l) * 3 + p) * 32 + row % 16 / 2 * 4 + of_q] = {
              two[0].pair[p][0], two[1].pair[p][0], two[0].pair[p][1], two[1].pair[p][1]};
    }
    if (threadIdx.x < rows) group.counts[threadIdx.x] = 0;
    cluster_sync();

    const auto rows_where = [&](auto f) { return __ballot_sync(~0u, lane < rows && f(min(lane, rows - 1))); };
    const uint32_t active = rows_where([&](int row) { return group.active[row] != 0; });
    if (!active && in_place) {
      fetch(which + clusters);
      continue;
    }
    const auto in_tile = [](uint32_t some, int tile) { return some >> 16 * tile & 0xffffu; };

    // --- The residual of all rows. Values past the last are read as the last: their c is zero.
    Residual r[kMaxTiles];
#pragma unroll
    for (int tile = 0; tile < kMaxTiles; tile++)
#pragma unroll
      for (int piece = 0; piece < kPieces; piece++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
          for (int i = 0; i < 4; i++) r[tile][piece][j][i] = 0.0f;
    if (active) {
      const Row* const from = static_cast<const Row*>(a.values) + column0 + warp * kPieces * 32 + 4 * g;
#pragma unroll
      for (int l = 0; l < kSteps; l++) {
        Parts<1> value[kPieces][4];
#pragma unroll
        for (int piece = 0; piece < kPieces; piece++) {
          Quad<Row> of[4] = {};
          if (has(piece))
#pragma unroll
            for (int i = 0; i < 4; i++)
              of[i] = reinterpret_cast<const Quad<Row>&>(
                  from[min(l * 16 + 2 * q + (i & 1) + (i & 2) * 4, m - 1) * d + piece * 32]);
#pragma unroll
          for (int j = 0; j < 2; j++) {
            const Columns<1> two = columns(of, j);
            value[piece][2 * j] = two.lower, value[piece][2 * j + 1] = two.upper;
          }
        }
#pragma unroll
        for (int tile = 0; tile < kMaxTiles; tile++)
          if (tile < tiles) {
            Parts<3> lower, upper;
#pragma unroll
            for (int p = 0; p < 3; p++) {
              const uint4 word = parts[((tile * kSteps + l) * 3 + p) * 32 + lane];
              lower.pair[p][0] = word.x, upper.pair[p][0] = word.y, lower.pair[p][1] = word.z, upper.pair[p][1] = word.w;
            }
#pragma unroll
            for (int piece = 0; piece < kPieces; piece++)
#pragma unroll
              for (int j = 0; j < 4; j++) multiply_add(r[tile][piece][j], lower, upper, value[piece][j]);
          }
      }
    }

    bool any_odd = false;  // rows where it is not simply a magnitude that decides
    if (active && selects) {
      // --- A sample, every fourth column, to the rows' owners, who choose windows by it.
      const int words = d / 8;
#pragma unroll
      for (int tile = 0; tile < kMaxTiles; tile++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int row = tile * 16 + 2 * g + i, owner = row / at.own;
          if (tile < tiles)
#pragma unroll
            for (int piece = 0; piece < kPieces; piece++)
              if (has(piece))
                of_block(sample, owner)[(row - owner * at.own) * words + rank * (kSlice / 8) + (warp * kPieces + piece) * 4 + q] =
                    __byte_perm(__float_as_uint(r[tile][piece][0][2 * i]), __float_as_uint(r[tile][piece][0][2 * i + 1]),
                                0x7632) & 0x7fff7fffu;
        }
      cluster_sync();
      for (int i = warp; i < 2 * own; i += kClusterWarps) {  // the lower ends and the upper ones
        const int row = i / 2;
        if (!group.passes[row]) continue;
        uint32_t word[kMaxBlocks * kSlice / 8 / 32], most = 0;
#pragma unroll
        for (int w = 0; w < kMaxBlocks * kSlice / 8 / 32; w++) {
          word[w] = w * 32 + lane < words ? sample[row * words + w * 32 + lane] : 0;
          most = max(most, max(word[w] & 0xffffu, word[w] >> 16));
        }
        constexpr uint32_t kLast = kInfinity >> 16;
        const uint32_t end = min(__reduce_max_sync(~0u, most) + 1, kLast);
        const float expected = float(k) / 4, deviation = sqrtf(expected * (1 - float(k) / float(d)) * 0.75f);
        const float spread = 1 + kDeviations * deviation;
        const int slack = int(deviation / 2);  // so exact it need not be
        const bool upper = i % 2;
        const int wanted = int(upper ? ceilf(expected - spread) - slack : ceilf(expected + spread));
        Bracket of = {end, end};
        if (wanted >= 1 || !upper)
          of = rank_of([&](uint32_t x) { return halves_reaching(word, x); }, 2 * words, min(wanted, 2 * words), 0, end, slack);
        if (upper)
          tell(group.hi[own0 + row], max(of.hi, 1u) << 16);
        else
          tell(group.lo[own0 + row], min(of.lo, kLast - 1) << 16);
      }
      cluster_sync();

      for (uint32_t open; (open = rows_where([&](int row) { return group.lo[row] != kNone; }));) {
        // --- Entries of this slice above and inside the windows.
#pragma unroll
        for (int tile = 0; tile < kMaxTiles; tile++) {
          if (!in_tile(open, tile)) continue;
#pragma unroll
          for (int i = 0; i < 2; i++) {
            const int row = tile * 16 + 2 * g + i;
            const uint32_t lo = group.lo[row], hi = group.hi[row];
            uint32_t above, inside;
            if (__ballot_sync(~0u, lo != kNone && ((lo | hi) & 0xffffu || lo - 1 < 0x7fffffu || hi > kInfinity))) {
              above = bits_reaching(r[tile], i, hi), inside = bits_reaching(r[tile], i, lo) & ~above;
            } else {
              above = bits_reaching_half(r[tile], i, hi), inside = bits_reaching_half(r[tile], i, lo) & ~above;
            }
            uint32_t mine = 0;
#pragma unroll
            for (int piece = 0; piece < kPieces; piece++)
              if (has(piece)) mine |= 0x000f000fu << 4 * piece;
            above &= mine, inside &= lo == kNone ? 0 : mine;
            const uint32_t count = uint32_t(__popc(above)) << 16 | uint32_t(__popc(inside));
            const uint32_t sum = quad_inclusive_scan(count);
            uint32_t base = 0;
            if (q == 3) base = atomicAdd(&group.counts[row], sum);
            base = __shfl_sync(~0u, base, lane | 3);
            const uint32_t end = (base + sum) & 0xffffu;
            if (end > kListed) continue;
            uint32_t* place = lists + row * kListed + end - __popc(inside);
#pragma unroll
            for (int piece = 0; piece < kPieces; piece++)
#pragma unroll
              for (int e = 0; e < 8; e++)
                if (inside & bit_of(piece, e)) *place++ = __float_as_uint(r[tile][piece][e % 4][2 * i + e / 4]);
          }
        }
        cluster_sync();
        // --- Own rows: the least that is kept, or the next window.
        for (int i = warp; i < own; i += kClusterWarps) {
          const int row = own0 + i;
          const uint32_t lo = group.lo[row], hi = group.hi[row];
          if (lo == kNone) continue;
          const uint32_t of_slice = lane < blocks ? of_block(group.counts, lane)[row] : 0;
          const int slice_inside = int(of_slice & 0xffffu), before = int(warp_inclusive_scan(of_slice & 0xffffu)) - slice_inside;
          const int above = __reduce_add_sync(~0u, int(of_slice >> 16)), inside = __shfl_sync(~0u, before + slice_inside, 31);
          const bool fits = inside <= at.list_size(blocks) && !__ballot_sync(~0u, slice_inside > kListed);
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
            // Four lanes fetch a block's list.
            uint32_t* const list = reinterpret_cast<uint32_t*>(told) + i * at.list_size(blocks);
            const int first = __shfl_sync(~0u, before, lane / 4), size = __shfl_sync(~0u, slice_inside, lane / 4);
            const uint32_t* const there = of_block(lists, min(lane / 4, blocks - 1)) + row * kListed;
#pragma unroll 8
            for (int j = lane % 4; j < size; j += 4) list[first + j] = there[j] & 0x7fffffffu;
            __syncwarp();
            uint32_t entry[kListWords];
#pragma unroll
            for (int w = 0; w < kListWords; w++) entry[w] = w * 32 + lane < inside ? list[w * 32 + lane] : 0;
            const auto reaching = [&](uint32_t x) {
              int count = 0;
#pragma unroll
              for (int w = 0; w < kListWords; w++) count += entry[w] >= x;
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
        if (rows_where([&](int row) { return group.lo[row] != kNone; })) __syncthreads();
      }

      // --- Where not all entries of the least magnitude are kept, those of the first columns are.
      any_odd = rows_where([&](int row) { return group.active[row] && (group.ties[row] || group.least[row] > kInfinity); });
      if (any_odd) {
#pragma unroll
        for (int tile = 0; tile < kMaxTiles; tile++)
          if (tile < tiles)
#pragma unroll
            for (int i = 0; i < 2; i++) {
              const int row = tile * 16 + 2 * g + i;
#pragma unroll
              for (int piece = 0; piece < kPieces; piece++) {
                uint32_t count = 0;
#pragma unroll
                for (int e = 0; e < 8; e++)
                  count += magnitude(r[tile][piece][e % 4][2 * i + e / 4]) == group.least[row];
                const uint32_t sum = quad_inclusive_scan(count);
                if (q == 3) piece_ties[(row * kClusterWarps + warp) * kPieces + piece] = int(sum);
              }
            }
        __syncthreads();
        if (threadIdx.x < rows) {
          int sum = 0;
          for (int piece = 0; piece < kClusterWarps * kPieces; piece++) {
            int& place = piece_ties[threadIdx.x * kClusterWarps * kPieces + piece];
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
        // What is not kept becomes zero, whose addition changes nothing.
#pragma unroll
        for (int tile = 0; tile < kMaxTiles; tile++)
          if (tile < tiles)
#pragma unroll
            for (int i = 0; i < 2; i++) {
              const int row = tile * 16 + 2 * g + i;
              const uint32_t least = group.least[row];
#pragma unroll
              for (int piece = 0; piece < kPieces; piece++) {
                uint32_t count = 0;
#pragma unroll
                for (int e = 0; e < 8; e++) count += magnitude(r[tile][piece][e % 4][2 * i + e / 4]) == least;
                int before = int(quad_inclusive_scan(count) - count) + group.tied_before[row] +
                             piece_ties[(row * kClusterWarps + warp) * kPieces + piece];
#pragma unroll
                for (int e = 0; e < 8; e++) {
                  float& x = r[tile][piece][e % 4][2 * i + e / 4];
                  if (magnitude(x) < least || (magnitude(x) == least && group.ties[row] && before++ >= group.ties[row]))
                    x = 0.0f;
                }
              }
            }
      }
    }

    // --- Out: a warp its columns of all rows.
#pragma unroll
    for (int tile = 0; tile < kMaxTiles; tile++) {
      if (tile >= tiles || (in_place && !in_tile(active, tile))) continue;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int row = tile * 16 + 2 * g + i;
        const bool edits = active >> row & 1;
        if (row0 + row >= a.rows || (in_place && !edits)) continue;
        const float least = !selects ? 0.0f : any_odd ? __uint_as_float(1) : __uint_as_float(group.least[row]);
#pragma unroll
        for (int piece = 0; piece < kPieces; piece++)
          if (has(piece)) {
            const int in_slice = warp * kPieces + piece;
            Chunk x = reinterpret_cast<const Chunk&>(memory[chunk_at(row, 4 * in_slice + q)]);
            if (edits)
#pragma unroll
              for (int odd = 0; odd < 2; odd++) {
                const float(&of)[4][4] = r[tile][piece];
                x.quad[odd] = add_where(x.quad[odd], {of[0][2 * i + odd], of[1][2 * i + odd], of[2][2 * i + odd], of[3][2 * i + odd]},
                                        a.alpha, [=](float e) { return !(fabsf(e) < least); });
              }
            Row* const to = static_cast<Row*>(a.out) + (row0 + row) * a.d + column0 + in_slice * 32 + 8 * q;
            reinterpret_cast<Chunk&>(*to) = x;
          }
      }
    }
    __syncthreads();
    fetch(which + clusters);
  }
#endif
}

}  // namespace timerome
