// Which entries of a residual are kept; what it is part of is said in lowrank_products.cuh.
#pragma once
#include "lowrank_products.cuh"

namespace timerome {

// --- Ranks, by one warp.

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

// --- Where the residual lies.

// A block takes one set of eight rows, or two. Rows that pass have the first of its slots. Of the columns a warp takes
// a piece of 32 in every kApplyColumns, and lane 4 g + q of these 4 g to 4 g + 3, for the slots 2 q and 2 q + 1 of each
// set.
constexpr int kSetRows = 8, kMostRows = 2 * kSetRows;
constexpr int kApplyColumns = kLowrankWarps * 32;
constexpr int kPieces = int(kLowrankCudaMaxD) / kApplyColumns;

// A sample of a row says between which magnitudes the least that is kept should lie, its window. Entries above are
// counted, those inside listed, and the least is found among them. If it is not, the window moves.
constexpr int kSampleWords = int(kLowrankCudaMaxD) / 8;  // every fourth column, two in a word
constexpr float kDeviations = 4.5f;  // from the expected to the window's ends: one row of 100 000 is beyond

// Two sets are more than the shared memory holds: registers hold the last pieces, and lists are shorter.
template <int kSets>
struct Room {
  static constexpr int kRows = kSets * kSetRows, kShared = kSets == 1 ? kPieces : 6, kHeld = kPieces - kShared;
  static constexpr int kListWords = kSets == 1 ? 20 : 16;  // entries of a window that can be listed: so many a lane
  static constexpr int kListed = 32 * kListWords,
                       kListStride = kListed + 4;  // so that the slots of a warp share no bank
  static constexpr int kListBytes = kRows * kListStride * 4;
  static_assert(kSampleWords <= kListed && kSampleWords % 32 == 0, "the sample lies where the list will");
};

// A lane's part of the residual: of each piece four columns of each of its slots.
template <int kSets>
struct Residual {
  static constexpr int kSlots = 2 * kSets, kShared = Room<kSets>::kShared, kHeld = Room<kSets>::kHeld;
  Quad<float>* first;  // in the shared memory, each thread's where only it looks
  int pieces;
  Quad<float> held[kHeld ? kHeld : 1][kSlots];  // loops over pieces are unrolled, so that these are registers

  // Its i-th slot.
  static __device__ __forceinline__ int slot(int i) { return i / 2 * kSetRows + 2 * int(threadIdx.x & 3) + i % 2; }
  __device__ __forceinline__ Quad<float>& shared(int piece, int i) const {
    return first[(piece * kSlots + i) * kLowrankThreads];
  }
  __device__ __forceinline__ Quad<float>& at(int piece, int i) {
    return piece < kShared ? shared(piece, i) : held[piece < kShared ? 0 : piece - kShared][i];
  }
  // What was made of held entries is not kept, for it would take as many registers again.
  __device__ __forceinline__ void hold_no_more() {
#pragma unroll
    for (int b = 0; b < kHeld; b++)
#pragma unroll
      for (int i = 0; i < kSlots; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) make_anew(held[b][i].e[e]);
  }
  // Calls f(piece, its quad of a slot) for all pieces.
  template <class F>
  __device__ __forceinline__ void for_pieces(int i, F f) {
#pragma unroll
    for (int b = 0; b < kPieces; b++)
      if (b < pieces) f(b, at(b, i));
  }
};
template <int kSets>
inline __host__ __device__ int residual_bytes(int d) {
  const int columns = up_to(d, kApplyColumns), most = Room<kSets>::kShared * kApplyColumns;
  return Room<kSets>::kRows * (columns < most ? columns : most) * 4;
}

// --- Selection.

// Which entries of a lane are above a window and which inside: a bit for each.
struct Bits {
  uint32_t above, inside;
};
__device__ __forceinline__ uint32_t bit_of(int piece, int e) { return 1u << (e % 2 * 16 + piece * 2 + e / 2); }
template <int kSets>
__device__ __forceinline__ Bits window_bits(Residual<kSets>& r, int i, uint32_t lo, uint32_t hi) {
  uint32_t reaching_lo = 0, reaching_hi = 0;
  r.for_pieces(i, [&](int b, const Quad<float>& x) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      if (magnitude(x.e[e]) >= lo) reaching_lo |= bit_of(b, e);
      if (magnitude(x.e[e]) >= hi) reaching_hi |= bit_of(b, e);
    }
  });
  return {reaching_hi, reaching_lo & ~reaching_hi};
}
// The same, two entries at once, where the ends are bfloat16s.
template <int kSets>
__device__ __forceinline__ Bits window_bits_of_halves(Residual<kSets>& r, int i, uint32_t lo, uint32_t hi) {
  static_assert(kPieces * 2 <= 16, "a bit for each entry");
  const uint32_t both_lo = __byte_perm(lo, lo, 0x3232), both_hi = __byte_perm(hi, hi, 0x3232);
  uint32_t reaching_lo = 0, reaching_hi = 0;
  r.for_pieces(i, [&](int b, const Quad<float>& x) {
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      const uint32_t word = halves(x.e[e], x.e[e + 1]), two = bit_of(b, e) | bit_of(b, e + 1);
      reaching_lo |= __hgeu2_mask(as_halves(word), as_halves(both_lo)) & two;
      reaching_hi |= __hgeu2_mask(as_halves(word), as_halves(both_hi)) & two;
    }
  });
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
  uint32_t lo[kMostRows], hi[kMostRows];              // windows; kNone where nothing is looked for any more
  uint32_t known_lo[kMostRows], known_hi[kMostRows];  // the least that is kept is in between
  uint32_t counts[kMostRows];                         // entries above the window, times 2^16, and inside
  uint32_t least[kMostRows];                          // magnitude that is kept
  int ties[kMostRows];                                // how many of that magnitude are kept; 0: all
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
    choice.hi[slot] = max(of.hi, 1u) << 16, choice.known_lo[slot] = 0, choice.known_hi[slot] = kEnd,
    choice.counts[slot] = 0;
  else
    choice.lo[slot] = min(of.lo, kLast - 1) << 16;
}

// Finds the least that is kept among a slot's list, or moves its window, by a warp.
template <int kListWords>
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
  } else if (inside > 32 * kListWords) {
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
    inside <= 16 * kListWords ? find(std::integral_constant<int, kListWords / 2>())
                              : find(std::integral_constant<int, kListWords>());
  }
  __syncwarp();  // all lanes have read what the first now writes
  if (lane) return;
  choice.lo[slot] = next_lo, choice.hi[slot] = next_hi, choice.known_lo[slot] = known_lo,
  choice.known_hi[slot] = known_hi;
  choice.least[slot] = max(least, 1u), choice.ties[slot] = least ? ties : 0;  // to add zero changes nothing
  choice.counts[slot] = 0;
}

// Decides for `count` slots what is kept: entries whose magnitude reaches choice.least[slot], or, if it returns true,
// all that are not zero: then the others were made so. Called by all threads; `lists` has room for
// Room<kSets>::kListBytes.
template <int kSets>
__device__ __forceinline__ bool choose(Residual<kSets>& r, Choice& choice, uint32_t* lists, int count, int d, int k) {
  using Room = timerome::Room<kSets>;
  constexpr int kSlots = Residual<kSets>::kSlots;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, q = lane & 3;
#pragma unroll
  for (int i = 0; i < kSlots; i++)
#pragma unroll
    for (int b = 0; b < kPieces; b += 2)
      lists[r.slot(i) * Room::kListStride + b / 2 * (kApplyColumns / 4) + warp * 8 + g] =
          halves(b < r.pieces ? r.at(b, i).e[0] : 0, b + 1 < r.pieces ? r.at(b + 1, i).e[0] : 0);
  __syncthreads();
  for (int end = warp; end < 2 * count; end += kLowrankWarps)
    choose_window(choice, lists + end / 2 * Room::kListStride, end / 2, end % 2, d, k);
  __syncthreads();

  const auto slots_where = [&](auto f) { return __ballot_sync(~0u, lane < count && f(lane % kMostRows)); };
  for (uint32_t open = (1u << count) - 1; open;) {
    r.hold_no_more();
#pragma unroll
    for (int i = 0; i < kSlots; i++) {
      const int slot = r.slot(i);
      const bool looks = open >> slot & 1;
      const uint32_t lo = looks ? choice.lo[slot] : 0, hi = looks ? choice.hi[slot] : 0;
      Bits bits;
      // Magnitudes too small for a float's full precision are left to the integers, whatever the cores make of them.
      if (__ballot_sync(~0u, (lo | hi) & 0xffffu || lo - 1 < 0x7fffffu || hi > kInfinity))
        bits = window_bits(r, i, lo, hi);
      else
        bits = window_bits_of_halves(r, i, lo, hi);
      const uint32_t above = looks ? bits.above : 0, inside = looks ? bits.inside : 0;
      const uint32_t own = uint32_t(__popc(above)) << 16 | uint32_t(__popc(inside));
      const uint32_t sum = inclusive_scan_over_g(own);
      uint32_t base = 0;
      if (g == 7 && looks) base = atomicAdd(&choice.counts[slot], sum);
      base = __shfl_sync(~0u, base, 28 + q);
      const int last = int((base + sum) & 0xffffu);
      if (last > Room::kListed) continue;
      uint32_t* place = lists + slot * Room::kListStride + last - __popc(inside);
      r.for_pieces(i, [&](int b, const Quad<float>& x) {
#pragma unroll
        for (int e = 0; e < 4; e++)
          if (inside & bit_of(b, e)) *place++ = __float_as_uint(x.e[e]);
      });
    }
    __syncthreads();
    if (warp < count) choose_least<Room::kListWords>(choice, lists + warp * Room::kListStride, warp, k);
    __syncthreads();
    open = slots_where([&](int slot) { return choice.lo[slot] != kNone; });
  }

  const uint32_t odd_ones = slots_where([&](int slot) { return choice.ties[slot] || choice.least[slot] > kInfinity; });
  if (!odd_ones) return false;
  r.hold_no_more();
  // Of entries equal to the least, those of the first columns are kept: they are counted by piece and warp.
  int* const tied = reinterpret_cast<int*>(lists);
  const auto place_of = [&](int slot, int b, int w) { return (slot * kPieces + b) * kLowrankWarps + w; };
  const auto own_ties = [&](const Quad<float>& of, uint32_t least) {
    uint32_t sum = 0;
#pragma unroll
    for (int e = 0; e < 4; e++) sum += magnitude(of.e[e]) == least;
    return sum;
  };
#pragma unroll
  for (int i = 0; i < kSlots; i++)
#pragma unroll
    for (int b = 0; b < kPieces; b++) {
      const uint32_t own = b < r.pieces ? own_ties(r.at(b, i), choice.least[r.slot(i)]) : 0;
      const uint32_t sum = inclusive_scan_over_g(own);
      if (g == 7) tied[place_of(r.slot(i), b, warp)] = int(sum);
    }
  __syncthreads();
  if (threadIdx.x < Room::kRows) {
    int before = 0;
    for (int i = 0; i < kPieces * kLowrankWarps; i++) {
      const int here = tied[place_of(threadIdx.x, 0, i)];
      tied[place_of(threadIdx.x, 0, i)] = before;
      before += here;
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kSlots; i++)
    r.for_pieces(i, [&](int b, Quad<float>& x) {  // as many for all lanes of a warp
      const int slot = r.slot(i), ties = choice.ties[slot];
      const uint32_t least = choice.least[slot], own = own_ties(x, least);
      int before = tied[place_of(slot, b, warp)] + int(inclusive_scan_over_g(own) - own);
#pragma unroll
      for (int e = 0; e < 4; e++)
        if (magnitude(x.e[e]) < least || (magnitude(x.e[e]) == least && ties && before++ >= ties)) x.e[e] = 0.0f;
    });
  __syncthreads();  // the lists are free again
  return true;
}

}  // namespace timerome
