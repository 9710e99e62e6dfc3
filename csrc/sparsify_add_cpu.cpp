// out[t, :] = h[t, :] + alpha * r[t, :] on the k largest |r[t, :]|, h[t, :] elsewhere; ties go to the lowest index.
#include <algorithm>
#include <cstring>
#include <functional>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "kernels.h"

// Build the row loop for several instruction sets and let the loader choose: the wheel itself targets plain x86-64.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define TIMEROME_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define TIMEROME_CLONES
#endif
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

// Adds where the magnitude reaches the threshold. Entries that are not kept are copied bit for bit.
template <class T>
TIMEROME_INLINE void add_at_least(const typename T::Storage* h, const float* r, typename T::Storage* out, int64_t n,
                                  uint32_t threshold, float alpha) {
  for (int64_t i = 0; i < n; i++) {
    const typename T::Storage sum = T::store(T::load(h[i]) + alpha * r[i]);
    out[i] = magnitude(r[i]) >= threshold ? sum : h[i];
  }
}
// Plain functions, because target_clones cannot be put on a template.
TIMEROME_CLONES void add_row(Float32, const float* h, const float* r, float* out, int64_t n, uint32_t at, float alpha) {
  add_at_least<Float32>(h, r, out, n, at, alpha);
}
TIMEROME_CLONES void add_row(Float16, const uint16_t* h, const float* r, uint16_t* out, int64_t n, uint32_t at,
                             float alpha) {
  add_at_least<Float16>(h, r, out, n, at, alpha);
}
TIMEROME_CLONES void add_row(BFloat16, const uint16_t* h, const float* r, uint16_t* out, int64_t n, uint32_t at,
                             float alpha) {
  add_at_least<BFloat16>(h, r, out, n, at, alpha);
}

// What a row keeps: magnitudes >= threshold before index `cut`, > threshold from there on.
struct Selection {
  uint32_t threshold;
  int64_t cut;
};

// Exact selection of the k largest magnitudes, 0 < k < d: one histogram pass over the 11 leading bits finds the bin of
// the k-th, nth_element finishes inside that bin. `bin` is scratch for d values.
Selection select(const float* r, int64_t d, int64_t k, uint32_t* bin) {
  constexpr int kShift = 20, kBins = 1 << 11, kLanes = 4;
  // Four histograms, because neighbours that fall into one bin would wait for each other's store.
  uint32_t count[kLanes][kBins] = {};
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes)
    for (int lane = 0; lane < kLanes; lane++) count[lane][magnitude(r[i + lane]) >> kShift]++;
  for (; i < d; i++) count[0][magnitude(r[i]) >> kShift]++;

  int64_t need = k;  // how many of the bin that holds the k-th largest are kept
  uint32_t top = kBins - 1;
  for (;; top--) {
    const int64_t n = int64_t(count[0][top]) + count[1][top] + count[2][top] + count[3][top];
    if (n >= need) break;
    need -= n;
  }
  int64_t n = 0;
  for (i = 0; i < d; i++) {
    const uint32_t m = magnitude(r[i]);
    bin[n] = m;  // n <= i < d, so the write is in range even when the value is not counted
    n += (m >> kShift) == top;
  }
  std::nth_element(bin, bin + (need - 1), bin + n, std::greater<uint32_t>());
  const uint32_t threshold = bin[need - 1];

  const int64_t above = std::count_if(bin, bin + need, [=](uint32_t m) { return m > threshold; });
  int64_t ties = need - above;  // how many entries equal to the threshold are kept
  if (std::count(bin, bin + n, threshold) == ties) return {threshold, d};
  for (i = 0; ties > 0; i++) ties -= magnitude(r[i]) == threshold;
  return {threshold, i};
}

template <class T>
void sparsify_add(const void* h_, const float* r, void* out_, const uint8_t* mask, int64_t rows, int64_t d, int64_t k,
                  float alpha, int threads) {
  using S = typename T::Storage;
  const S* h = static_cast<const S*>(h_);
  S* out = static_cast<S*>(out_);
  // A thread is woken only for about 20 microseconds of work or more; below that, waking it costs more than it saves.
  threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, rows * d / 32768)));
  std::vector<uint32_t> scratch(size_t(threads) * d);  // out here: nothing may throw inside the parallel loop
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
#endif
  {
#ifdef _OPENMP
    uint32_t* bin = scratch.data() + size_t(omp_get_thread_num()) * d;
#pragma omp for schedule(static, 8)
#else
    uint32_t* bin = scratch.data();
#endif
    for (int64_t t = 0; t < rows; t++) {
      const S* h_row = h + t * d;
      const float* r_row = r + t * d;
      S* out_row = out + t * d;
      if (k == 0 || (mask && !mask[t])) {
        if (out_row != h_row) std::memcpy(out_row, h_row, size_t(d) * sizeof(S));
        continue;
      }
      const Selection keep = k >= d ? Selection{0, d} : select(r_row, d, k, bin);
      add_row(T(), h_row, r_row, out_row, keep.cut, keep.threshold, alpha);
      add_row(T(), h_row + keep.cut, r_row + keep.cut, out_row + keep.cut, d - keep.cut, keep.threshold + 1, alpha);
    }
  }
}

}  // namespace

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
