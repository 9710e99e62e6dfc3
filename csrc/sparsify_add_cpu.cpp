// out[t, :] = h[t, :] + alpha * r[t, :] on the k largest |r[t, :]|, h[t, :] elsewhere; ties go to the lowest index.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "clones.h"
#include "kernels.h"
#include "rows_cpu.h"

#define TIMEROME_INLINE inline __attribute__((always_inline))

namespace timerome {
namespace {

template <class To, class From>
TIMEROME_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Magnitude as an integer: |x| < |y| exactly when magnitude(x) < magnitude(y), and every NaN is above infinity.
TIMEROME_INLINE uint32_t magnitude(float x) { return bit_cast<uint32_t>(x) & 0x7fffffffu; }

struct Float32 {
  using Storage = float;
  static TIMEROME_INLINE float load(float x) { return x; }
  static TIMEROME_INLINE float store(float x) { return x; }
};

struct BFloat16 {
  using Storage = uint16_t;
  static TIMEROME_INLINE float load(uint16_t x) { return bit_cast<float>(uint32_t(x) << 16); }
  static TIMEROME_INLINE uint16_t store(float x) {
    const uint32_t u = bit_cast<uint32_t>(x);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1)) >> 16;  // to nearest, ties to even
    return uint16_t((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  }
};

// Without branches and without F16C, so that it vectorises on any target.
struct Float16 {
  using Storage = uint16_t;
  static TIMEROME_INLINE float load(uint16_t x) {
    const uint32_t sign = uint32_t(x & 0x8000u) << 16, body = x & 0x7fffu;
    // 2^112 moves the exponent bias from 15 to 127, subnormals included; infinity and NaN keep an all-ones exponent.
    const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(body << 13) * bit_cast<float>(0x77800000u));
    return bit_cast<float>(sign | (body < 0x7c00u ? finite : (body << 13) | 0x7f800000u));
  }
  static TIMEROME_INLINE uint16_t store(float x) {
    const uint32_t u = bit_cast<uint32_t>(x), body = u & 0x7fffffffu, sign = (u >> 16) & 0x8000u;
    const uint32_t normal = (body - 0x38000000u + 0xfffu + ((body >> 13) & 1)) >> 13;  // to nearest, ties to even
    // Below 2^-14 the sum with 0.5 lines the last half-precision bit up with the last float bit: the FPU rounds.
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(body) + 0.5f) - 0x3f000000u;
    const uint32_t finite = body < 0x38800000u ? subnormal : std::min(normal, 0x7c00u);
    const uint32_t result = body >= 0x7f800000u ? (body > 0x7f800000u ? 0x7e00u : 0x7c00u) : finite;
    return uint16_t(sign | result);
  }
};

// Adds where the magnitude is above `bound`. Entries that are not kept are copied bit for bit.
template <class T>
TIMEROME_INLINE void add_above(const typename T::Storage* h, const float* r, typename T::Storage* out, int64_t n,
                               int32_t bound, float alpha) {
#pragma GCC ivdep  // out may be h or r, but then in the same places
  for (int64_t i = 0; i < n; i++) {
    const typename T::Storage sum = T::store(T::load(h[i]) + alpha * r[i]);
    out[i] = int32_t(magnitude(r[i])) > bound ? sum : h[i];  // signed, as in count_at_least
  }
}
// Plain functions, because target_clones cannot be put on a template.
TIMEROME_CLONES void add_row(Float32, const float* h, const float* r, float* out, int64_t n, int32_t bound,
                             float alpha) {
  add_above<Float32>(h, r, out, n, bound, alpha);
}
TIMEROME_CLONES void add_row(Float16, const uint16_t* h, const float* r, uint16_t* out, int64_t n, int32_t bound,
                             float alpha) {
  add_above<Float16>(h, r, out, n, bound, alpha);
}
TIMEROME_CLONES void add_row(BFloat16, const uint16_t* h, const float* r, uint16_t* out, int64_t n, int32_t bound,
                             float alpha) {
  add_above<BFloat16>(h, r, out, n, bound, alpha);
}

// What a row keeps: magnitudes >= threshold before index `cut`, > threshold from there on.
struct Selection {
  uint32_t threshold;
  int64_t cut;
};

// How many magnitudes reach t. They are below 2^31, so a signed comparison, which every instruction set has, will do.
TIMEROME_CLONES int64_t count_at_least(const float* r, int64_t n, uint32_t t) {
  int64_t count = 0;
  for (int64_t from = 0; from < n; from += 1 << 30) {
    const int32_t size = int32_t(std::min<int64_t>(n - from, 1 << 30));
    int32_t part = 0;  // as wide as what is compared, or it would not vectorise well
    for (int32_t i = 0; i < size; i++) part += int32_t(magnitude(r[from + i])) >= int32_t(t);
    count += part;
  }
  return count;
}

// Copies the values whose magnitude is in [low, high), in order; `out` has room for n values and one vector more.
// Returns how many, and in *above how many are at least high.
int64_t pick_between(const float* r, int64_t n, uint32_t low, uint32_t high, float* out, int64_t* above) {
  int64_t picked = 0, larger = 0;
  for (int64_t i = 0; i < n; i++) {
    const uint32_t m = magnitude(r[i]);
    out[picked] = r[i];  // picked <= i, so the write is in range even when the value is not counted
    picked += m - low < high - low;
    larger += m >= high;
  }
  *above = larger;
  return picked;
}

#ifdef TIMEROME_AVX512
__attribute__((target("avx512f"))) int64_t pick_between_avx512(const float* r, int64_t n, uint32_t low, uint32_t high,
                                                               float* out, int64_t* above) {
  const __m512i no_sign = _mm512_set1_epi32(0x7fffffff), lows = _mm512_set1_epi32(int(low)),
                width = _mm512_set1_epi32(int(high - low)), highs = _mm512_set1_epi32(int(high));
  int64_t picked = 0, larger = 0, i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m512i bits = _mm512_loadu_si512(r + i), m = _mm512_and_si512(bits, no_sign);
    const __mmask16 inside = _mm512_cmplt_epu32_mask(_mm512_sub_epi32(m, lows), width);
    _mm512_storeu_si512(out + picked, _mm512_maskz_compress_epi32(inside, bits));
    picked += __builtin_popcount(inside);
    larger += __builtin_popcount(_mm512_cmpge_epu32_mask(m, highs));
  }
  int64_t rest = 0;
  picked += pick_between(r + i, n - i, low, high, out + picked, &rest);
  *above = larger + rest;
  return picked;
}
#endif

#ifdef TIMEROME_X86
// For each mask of eight bits, the places of those that are set, in order.
struct Places {
  uint8_t of[256][8] = {};
  constexpr Places() {
    for (int mask = 0; mask < 256; mask++)
      for (int bit = 0, next = 0; bit < 8; bit++)
        if (mask >> bit & 1) of[mask][next++] = uint8_t(bit);
  }
};
constexpr Places places;

__attribute__((target("avx2,popcnt"))) int64_t pick_between_avx2(const float* r, int64_t n, uint32_t low, uint32_t high,
                                                                 float* out, int64_t* above) {
  // As signed numbers, which is what there are comparisons of: high may be 2^31, high - 1 is less.
  const __m256i no_sign = _mm256_set1_epi32(0x7fffffff), below_low = _mm256_set1_epi32(int(low) - 1),
                below_high = _mm256_set1_epi32(int(high - 1));
  int64_t picked = 0, larger = 0, i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(r + i));
    const __m256i m = _mm256_and_si256(bits, no_sign);
    const int from_low = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(m, below_low)));
    const int from_high = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(m, below_high)));
    const int inside = from_low & ~from_high;
    const __m256i order = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(places.of[inside])));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + picked), _mm256_permutevar8x32_epi32(bits, order));
    picked += __builtin_popcount(unsigned(inside));
    larger += __builtin_popcount(unsigned(from_high));
  }
  int64_t rest = 0;
  picked += pick_between(r + i, n - i, low, high, out + picked, &rest);
  *above = larger + rest;
  return picked;
}
#endif

using Pick = int64_t (*)(const float*, int64_t, uint32_t, uint32_t, float*, int64_t*);
Pick best_pick() {
#ifdef TIMEROME_AVX512
  if (__builtin_cpu_supports("avx512f")) return pick_between_avx512;
#endif
#ifdef TIMEROME_X86
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt")) return pick_between_avx2;
#endif
  return pick_between;
}
const Pick pick = best_pick();

// Where the k-th largest of some magnitudes lies, low <= it < high, and how many of them reach low, and high.
struct Bracket {
  uint32_t low, high;
  int64_t at_low, at_high;
};
constexpr uint32_t kTop = 0x80000000u;  // above every magnitude

TIMEROME_CLONES uint32_t largest(const float* r, int64_t n) {
  int32_t top = 0;
  for (int64_t i = 0; i < n; i++) top = std::max(top, int32_t(magnitude(r[i])));
  return uint32_t(top);
}

// Narrows the bracket until at most `few` of the n magnitudes lie in it, or one value. Tried as the next bound is where
// the counts say that a rank a little above k, or below it, should be, three octaves below the upper bound while the
// bracket is wider than that, and now and then the middle, so that no distribution takes long.
void narrow(const float* r, int64_t n, int64_t k, int few, Bracket& b) {
  constexpr uint32_t kOctaves = 3u << 23;
  const uint32_t top = largest(r, n);
  if (top < b.high) b.high = top + 1, b.at_high = 0;
  for (int turn = 0; b.at_low - b.at_high > few && b.high - b.low > 1; turn = turn == 2 ? 0 : turn + 1) {
    const uint32_t width = b.high - b.low;
    uint32_t step = width / 2;
    if (turn < 2 && width > kOctaves) {
      step = width - kOctaves;
    } else if (turn < 2) {
      const float rank = float(k - b.at_high) + float(turn == 0 ? few : -few) * 0.33f;
      const float part = 1.0f - rank / float(b.at_low - b.at_high);
      step = uint32_t(std::min(std::max(part, 0.0f), 1.0f) * float(width));
      step = std::min(std::max(step, 1u), width - 1);
    }
    const uint32_t middle = b.low + step;
    const int64_t count = count_at_least(r, n, middle);
    if (count >= k) {
      b.low = middle;
      b.at_low = count;
    } else {
      b.high = middle;
      b.at_high = count;
    }
  }
}

constexpr int kFew = 16;

struct Found {
  uint32_t threshold;
  int64_t larger, reached;  // how many magnitudes are larger, and how many at least as large
};
// The k-th largest of n magnitudes, known to lie in b.
Found kth_largest(const float* r, int64_t n, int64_t k, Bracket b) {
  narrow(r, n, k, kFew, b);
  if (b.high - b.low == 1) return {b.low, b.at_high, b.at_low};
  float few[kFew + 16];
  int32_t bits[kFew] = {};
  int64_t above = 0;
  const int64_t left = pick(r, n, b.low, b.high, few, &above);
  for (int64_t i = 0; i < left; i++) bits[i] = int32_t(magnitude(few[i]));
  int32_t threshold = 0;
  for (int64_t i = 0; i < left; i++) {
    int32_t reached = 0;
    for (int j = 0; j < kFew; j++) reached += bits[j] >= bits[i];
    if (above + reached >= k) threshold = std::max(threshold, bits[i]);
  }
  Found found{uint32_t(threshold), above, above};
  for (int64_t i = 0; i < left; i++) {
    found.larger += bits[i] > threshold;
    found.reached += bits[i] >= threshold;
  }
  return found;
}

constexpr int64_t kSample = 256;  // how many entries of a row are looked at for a first guess of its threshold

// Bounds between which the whole row's k-th largest magnitude should lie, from a sample.
Bracket guess(const float* r, int64_t d, int64_t k) {
  float sample[kSample];
  for (int64_t i = 0; i < kSample; i++) sample[i] = r[i * d / kSample];
  const double share = double(k) / double(d), middle = share * kSample;
  const double margin = 3 * std::sqrt(middle * (1 - share)) + 2;
  Bracket below{0, kTop, kSample, 0}, above = below;
  if (middle + margin <= kSample) narrow(sample, kSample, int64_t(middle + margin), 8, below);
  above.low = below.low, above.at_low = below.at_low;
  if (middle - margin >= 1) narrow(sample, kSample, int64_t(middle - margin), 8, above);
  return {middle + margin <= kSample ? below.low : 0, above.high, 0, 0};
}

// Exact selection of the k largest magnitudes, 0 < k < d. A sample brackets the threshold, one pass copies what lies in
// the bracket, and that is searched; should the sample have misled, the whole row is. `some` is scratch for d + 16
// values.
Selection select(const float* r, int64_t d, int64_t k, float* some) {
  Bracket b{0, kTop, d, 0};
  int64_t n = d, above = 0;  // how many are searched, and how many are above those
  if (d >= 4 * kSample) {
    const Bracket bounds = guess(r, d, k);
    n = pick(r, d, bounds.low, bounds.high, some, &above);
    if (above < k && k <= above + n)
      b = {bounds.low, bounds.high, n, 0};
    else
      n = d, above = 0;
  }
  const Found found = kth_largest(n < d ? some : r, n, k - above, b);
  int64_t ties = k - above - found.larger;  // how many entries equal to the threshold are kept
  if (found.reached - found.larger == ties) return {found.threshold, d};
  int64_t i = 0;
  for (; ties > 0; i++) ties -= magnitude(r[i]) == found.threshold;
  return {found.threshold, i};
}

template <class T>
void sparsify_add_row(const void* h_, const float* r, void* out_, int64_t d, int64_t k, float alpha, float* some) {
  const auto* h = static_cast<const typename T::Storage*>(h_);
  auto* out = static_cast<typename T::Storage*>(out_);
  const Selection keep = k >= d ? Selection{0, d} : select(r, d, k, some);
  add_row(T(), h, r, out, keep.cut, int32_t(keep.threshold) - 1, alpha);
  add_row(T(), h + keep.cut, r + keep.cut, out + keep.cut, d - keep.cut, int32_t(keep.threshold), alpha);
}

template <class T>
TIMEROME_INLINE void load_values(const typename T::Storage* h, const float* mean, float* x, int64_t d) {
  if (mean)
    for (int64_t i = 0; i < d; i++) x[i] = T::load(h[i]) - mean[i];
  else
    for (int64_t i = 0; i < d; i++) x[i] = T::load(h[i]);
}
TIMEROME_CLONES void load_row(Float32, const void* h, const float* mean, float* x, int64_t d) {
  load_values<Float32>(static_cast<const float*>(h), mean, x, d);
}
TIMEROME_CLONES void load_row(Float16, const void* h, const float* mean, float* x, int64_t d) {
  load_values<Float16>(static_cast<const uint16_t*>(h), mean, x, d);
}
TIMEROME_CLONES void load_row(BFloat16, const void* h, const float* mean, float* x, int64_t d) {
  load_values<BFloat16>(static_cast<const uint16_t*>(h), mean, x, d);
}

template <class T>
void sparsify_add(const void* h_, const float* r, void* out_, const uint8_t* mask, int64_t rows, int64_t d, int64_t k,
                  float alpha, int threads) {
  using S = typename T::Storage;
  const S* h = static_cast<const S*>(h_);
  S* out = static_cast<S*>(out_);
  // A thread is woken only for about 20 microseconds of work or more; below that, waking it costs more than it saves.
  threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, rows * d / 32768)));
  std::vector<float> scratch(size_t(threads) * (d + 16));  // out here: nothing may throw inside the parallel loop
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
#endif
  {
#ifdef _OPENMP
    float* some = scratch.data() + size_t(omp_get_thread_num()) * (d + 16);
#pragma omp for schedule(static, 8)
#else
    float* some = scratch.data();
#endif
    for (int64_t t = 0; t < rows; t++) {
      const S* h_row = h + t * d;
      const float* r_row = r + t * d;
      S* out_row = out + t * d;
      if (k == 0 || (mask && !mask[t])) {
        if (out_row != h_row) std::memcpy(out_row, h_row, size_t(d) * sizeof(S));
        continue;
      }
      sparsify_add_row<T>(h_row, r_row, out_row, d, k, alpha, some);
    }
  }
}

}  // namespace

void load_row_cpu(const void* h, const float* mean, float* x, int64_t d, int dtype) {
  if (dtype == 0) return load_row(Float32(), h, mean, x, d);
  if (dtype == 1) return load_row(Float16(), h, mean, x, d);
  load_row(BFloat16(), h, mean, x, d);
}

void sparsify_add_row_cpu(const void* h, const float* r, void* out, int64_t d, int64_t k, float alpha, int dtype,
                          float* scratch) {
  if (dtype == 0) return sparsify_add_row<Float32>(h, r, out, d, k, alpha, scratch);
  if (dtype == 1) return sparsify_add_row<Float16>(h, r, out, d, k, alpha, scratch);
  sparsify_add_row<BFloat16>(h, r, out, d, k, alpha, scratch);
}

void sparsify_add_cpu(const void* h, const float* r, void* out, const uint8_t* mask, int64_t rows, int64_t d, int64_t k,
                      float alpha, int dtype, int threads) {
  switch (dtype) {
    case 0:
      return sparsify_add<Float32>(h, r, out, mask, rows, d, k, alpha, threads);
    case 1:
      return sparsify_add<Float16>(h, r, out, mask, rows, d, k, alpha, threads);
    case 2:
      return sparsify_add<BFloat16>(h, r, out, mask, rows, d, k, alpha, threads);
  }
}

}  // namespace timerome
