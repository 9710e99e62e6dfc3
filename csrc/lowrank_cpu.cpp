// h + alpha S_q((h - mean) K^T A D) for few keys, in one pass: eight rows at a time go from h to the result without
// leaving the cache. With many keys a BLAS product is faster, and on a processor without AVX2 too.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "kernels.h"
#include "rows_cpu.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define TIMEROME_VECTORS
#endif
#define TIMEROME_INLINE inline __attribute__((always_inline))

namespace timerome {
namespace {

constexpr int kRows = 8;        // rows of a block
constexpr int kPair = 2;        // keys, or vectors of columns, that are worked on together
constexpr int64_t kSlice = 512;  // columns of a slice of the scores: eight rows of it fit the first cache

#ifdef TIMEROME_VECTORS

template <int kWidth>
struct Vector {
  typedef float Type __attribute__((vector_size(kWidth * sizeof(float))));
};
template <int kWidth>
TIMEROME_INLINE typename Vector<kWidth>::Type load(const float* p) {
  typename Vector<kWidth>::Type v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// scores[r][j] = x[r] . keys[j]. `sums` holds kWidth partial sums for each of them: they are added up at the end. Rows
// of x, as those of the residual below, are `ld` apart.
template <int kWidth>
TIMEROME_INLINE void score_block(const float* x, int64_t ld, const float* keys, float* sums, float* scores, int64_t d,
                                 int64_t n) {
  using V = typename Vector<kWidth>::Type;
  std::fill(sums, sums + kRows * n * kWidth, 0.0f);
  const int64_t whole = d / kWidth * kWidth;
  for (int64_t from = 0; from < whole; from += kSlice) {
    const int64_t to = std::min(from + kSlice, whole);
    for (int64_t j = 0; j < n; j += kPair) {
      const int64_t last = std::min<int64_t>(j + 1, n - 1);  // an odd last key is worked on twice
      V part[kRows][kPair];
      for (int r = 0; r < kRows; r++) {
        part[r][0] = load<kWidth>(sums + (r * n + j) * kWidth);
        part[r][1] = load<kWidth>(sums + (r * n + last) * kWidth);
      }
      for (int64_t i = from; i < to; i += kWidth) {
        const V a = load<kWidth>(keys + j * d + i), b = load<kWidth>(keys + last * d + i);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; r++) {
          V v = load<kWidth>(x + r * ld + i);
          asm("" : "+v"(v));  // or the compiler loads it twice, once for each product
          part[r][0] += v * a;
          part[r][1] += v * b;
        }
      }
      for (int r = 0; r < kRows; r++) {
        std::memcpy(sums + (r * n + last) * kWidth, &part[r][1], sizeof(V));
        std::memcpy(sums + (r * n + j) * kWidth, &part[r][0], sizeof(V));
      }
    }
  }
  for (int r = 0; r < kRows; r++)
    for (int64_t j = 0; j < n; j++) {
      float* part = sums + (r * n + j) * kWidth;
      float sum = 0;
      for (int64_t i = whole; i < d; i++) sum += x[r * ld + i] * keys[j * d + i];
      for (int width = kWidth / 2; width > 0; width /= 2)
        for (int l = 0; l < width; l++) part[l] += part[l + width];
      scores[r * n + j] = sum + part[0];
    }
}

// residual[r] = sum over m of c[r][m] values[m].
template <int kWidth>
TIMEROME_INLINE void expand_block(const float* c, const float* values, float* residual, int64_t ld, int64_t d,
                                  int64_t m) {
  using V = typename Vector<kWidth>::Type;
  const int64_t step = kPair * kWidth, whole = d / step * step;
  for (int64_t i = 0; i < whole; i += step) {
    V sum[kRows][kPair] = {};
    for (int64_t j = 0; j < m; j++) {
      const V a = load<kWidth>(values + j * d + i), b = load<kWidth>(values + j * d + i + kWidth);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; r++) {
        sum[r][0] += c[r * m + j] * a;
        sum[r][1] += c[r * m + j] * b;
      }
    }
    for (int r = 0; r < kRows; r++) std::memcpy(residual + r * ld + i, sum[r], sizeof sum[r]);
  }
  for (int r = 0; r < kRows; r++)
    for (int64_t i = whole; i < d; i++) {
      float sum = 0;
      for (int64_t j = 0; j < m; j++) sum += c[r * m + j] * values[j * d + i];
      residual[r * ld + i] = sum;
    }
}

// The same two for each instruction set. Multiply-add in one rounding where the processor has it, as in a BLAS product.
#define TIMEROME_TARGET(isa) __attribute__((target("arch=" isa), optimize("fp-contract=fast")))
#define TIMEROME_BOTH(isa, name, width)                                                                                \
  TIMEROME_TARGET(isa)                                                                                                 \
  void score_##name(const float* x, int64_t ld, const float* k, float* t, float* s, int64_t d, int64_t n) {            \
    score_block<width>(x, ld, k, t, s, d, n);                                                                          \
  }                                                                                                                    \
  TIMEROME_TARGET(isa)                                                                                                 \
  void expand_##name(const float* c, const float* v, float* r, int64_t ld, int64_t d, int64_t m) {                     \
    expand_block<width>(c, v, r, ld, d, m);                                                                            \
  }
TIMEROME_BOTH("x86-64-v4", v4, 16)
TIMEROME_BOTH("x86-64-v3", v3, 8)

const bool is_v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                   __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512cd");
const bool is_v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
const auto score = is_v4 ? score_v4 : score_v3;
const auto expand = is_v4 ? expand_v4 : expand_v3;

float norm(const float* x, int64_t d) {
  float part[16] = {};
  int64_t i = 0;
  for (; i + 16 <= d; i += 16)
    for (int l = 0; l < 16; l++) part[l] += x[i + l] * x[i + l];
  float sum = 0;
  for (; i < d; i++) sum += x[i] * x[i];
  for (float p : part) sum += p;
  return std::sqrt(sum);
}

// Whether a cosine similarity with one of the m keys reaches tau; 0 / 0 and NaN do not.
bool passes(const float* scores, const float* key_norm, float row_norm, float tau, int64_t m) {
  for (int64_t j = 0; j < m; j++)
    if (scores[j] / (row_norm * key_norm[j]) >= tau) return true;
  return false;
}

// What one thread needs: rows start at whole cache lines, and not all in the same few sets of the cache.
struct Scratch {
  int64_t ld;
  float *x, *residual, *some, *sums, *scores, *c;
  static int64_t pitch(int64_t d) { return (d + 15) / 16 * 16 + 16; }
  static int64_t size(int64_t d, int64_t n, int64_t m) { return (2 * kRows + 1) * pitch(d) + kRows * (17 * n + m) + 16; }
  Scratch(float* memory, int64_t d, int64_t n) : ld(pitch(d)) {
    x = memory + (64 - reinterpret_cast<uintptr_t>(memory) % 64) % 64 / sizeof(float);
    residual = x + kRows * ld;
    some = residual + kRows * ld;
    sums = some + ld;
    scores = sums + kRows * n * 16;
    c = scores + kRows * n;
  }
};

// One block: the rows of h in `place`, at most eight. Returns, as bits, which of them were edited.
unsigned edit_block(const LowrankCpu& a, const int64_t* place, int rows, const float* key_norm, const Scratch& s) {
  const int64_t bytes = a.d * element_size(a.dtype);
  const auto row = [&](const void* base, int r) { return static_cast<const char*>(base) + place[r] * bytes; };
  const auto out = [&](int r) { return static_cast<char*>(a.out) + place[r] * bytes; };
  for (int r = 0; r < rows; r++) load_row_cpu(row(a.h, r), a.mean, s.x + r * s.ld, a.d, a.dtype);
  std::fill(s.x + rows * s.ld, s.x + kRows * s.ld, 0.0f);
  score(s.x, s.ld, a.keys, s.sums, s.scores, a.d, a.n);
  unsigned edited = 0;
  for (int r = 0; r < rows; r++) {
    if (!a.gated || passes(s.scores + r * a.n, key_norm, norm(s.x + r * s.ld, a.d), a.tau, a.m))
      edited |= 1u << r;
    else if (a.out != a.h)
      std::memcpy(out(r), row(a.h, r), size_t(bytes));
  }
  if (!edited) return 0;
  std::fill(s.c, s.c + kRows * a.m, 0.0f);
  for (int r = 0; r < rows; r++)
    for (int64_t i = 0; i < a.n; i++)
      for (int64_t j = 0; j < a.m; j++) s.c[r * a.m + j] += s.scores[r * a.n + i] * a.coef[i * a.coef_stride + j];
  expand(s.c, a.values, s.residual, s.ld, a.d, a.m);
  for (int r = 0; r < rows; r++)
    if (edited >> r & 1)
      sparsify_add_row_cpu(row(a.h, r), s.residual + r * s.ld, out(r), a.d, a.k, a.alpha, a.dtype, s.some);
  return edited;
}

// A thread is woken for about 50 microseconds of work.
int threads_for(int64_t rows, int64_t d, int64_t products, int most) {
  return int(std::max<int64_t>(1, std::min<int64_t>(most, rows * d * (products + 8) / (1 << 20))));
}

#endif  // TIMEROME_VECTORS

}  // namespace

#ifdef TIMEROME_VECTORS

bool lowrank_cpu_supported() { return is_v3; }

void lowrank_cpu(const LowrankCpu& a) {
  std::vector<float> key_norm;
  if (a.gated)
    for (int64_t j = 0; j < a.m; j++) key_norm.push_back(norm(a.keys + j * a.d, a.d));
  const int64_t size = Scratch::size(a.d, a.n, a.m), bytes = a.d * element_size(a.dtype);
  const int threads = threads_for(a.last - a.first, a.d, a.n, a.threads);
  std::vector<float> scratch(size_t(threads) * size);  // out here: nothing may throw inside the parallel loop
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
#endif
  {
#ifdef _OPENMP
    const Scratch s(scratch.data() + omp_get_thread_num() * size, a.d, a.n);
#pragma omp for schedule(dynamic, 4)
#else
    const Scratch s(scratch.data(), a.d, a.n);
#endif
    for (int64_t start = a.first; start < a.last; start += kRows) {
      int64_t place[kRows];
      int rows = 0;
      for (int64_t t = start; t < std::min(start + kRows, a.last); t++) {
        if (!a.mask || a.mask[t])
          place[rows++] = t;
        else if (a.out != a.h)
          std::memcpy(static_cast<char*>(a.out) + t * bytes, static_cast<const char*>(a.h) + t * bytes, size_t(bytes));
      }
      if (!rows) continue;
      const unsigned edited = edit_block(a, place, rows, key_norm.data(), s);
      for (int r = 0; r < rows; r++)
        if (edited >> r & 1) {
#ifdef _OPENMP
#pragma omp atomic
#endif
          a.hits[place[r] / a.length]++;
        }
    }
  }
}

void expand_add_cpu(const ExpandAddCpu& a) {
  const int threads = threads_for(a.count, a.d, a.m, a.threads);
  const int64_t size = Scratch::size(a.d, 0, a.m), bytes = a.d * element_size(a.dtype);
  std::vector<float> scratch(size_t(threads) * size);  // out here: nothing may throw inside the parallel loop
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
#endif
  {
#ifdef _OPENMP
    const Scratch s(scratch.data() + omp_get_thread_num() * size, a.d, 0);
#pragma omp for schedule(dynamic, 4)
#else
    const Scratch s(scratch.data(), a.d, 0);
#endif
    for (int64_t start = 0; start < a.count; start += kRows) {
      const int rows = int(std::min<int64_t>(kRows, a.count - start));
      const float* c = a.c + start * a.m;
      if (rows < kRows) {
        std::copy(c, c + rows * a.m, s.c);
        std::fill(s.c + rows * a.m, s.c + kRows * a.m, 0.0f);
        c = s.c;
      }
      expand(c, a.values, s.residual, s.ld, a.d, a.m);
      for (int r = 0; r < rows; r++) {
        const int64_t at = (a.index ? a.index[start + r] : a.first + start + r) * bytes;
        sparsify_add_row_cpu(static_cast<const char*>(a.h) + at, s.residual + r * s.ld, static_cast<char*>(a.out) + at,
                             a.d, a.k, a.alpha, a.dtype, s.some);
      }
    }
  }
}

#else

bool lowrank_cpu_supported() { return false; }
void lowrank_cpu(const LowrankCpu&) {}
void expand_add_cpu(const ExpandAddCpu&) {}

#endif

}  // namespace timerome
