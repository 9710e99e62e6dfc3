// h + alpha S_q((h - mean) K^T A D) for few keys, in one pass: sixteen rows at a time go from h to the result without
// leaving the cache. With many keys a BLAS product is faster, and on a processor without AVX2 too.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "clones.h"
#include "kernels.h"
#include "rows_cpu.h"

#ifdef TIMEROME_X86
#include <unistd.h>
#ifndef TIMEROME_FIRST_CACHE_WAYS  // a test gives another number
#define TIMEROME_FIRST_CACHE_WAYS sysconf(_SC_LEVEL1_DCACHE_ASSOC)
#endif
#endif

#define TIMEROME_INLINE inline __attribute__((always_inline))

namespace timerome {
namespace {

constexpr int kBlock = 16;        // rows of a block: what is read of keys and values serves them all
constexpr int kRows = 8;          // rows that are worked on together, at most; a block is filled up to a multiple
constexpr int64_t kMost = 64;     // keys, and values, at most: timerome/ops/_lowrank.py sees to it
constexpr int64_t kSlice = 1024;  // columns of a slice of the scores: eight rows of it fit the first cache

#ifdef TIMEROME_X86

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
template <int kWidth>
TIMEROME_INLINE void store(float* p, const typename Vector<kWidth>::Type& v) {
  std::memcpy(p, &v, sizeof v);
}
template <int kWidth>
TIMEROME_INLINE float total(const float* p) {
  if constexpr (kWidth == 1) {
    return *p;
  } else {
    const auto sum = load<kWidth / 2>(p) + load<kWidth / 2>(p + kWidth / 2);
    float half[kWidth / 2];
    std::memcpy(half, &sum, sizeof sum);
    return total<kWidth / 2>(half);
  }
}

// sums[p][r] += partial sums of x[r] . keys[p] over the columns from .. to - 1, for kGroup rows and kKeys keys. Rows of
// x, as those of the residual below, are `ld` apart.
template <int kWidth, int kGroup, int kKeys>
TIMEROME_INLINE void score_keys(const float* x, int64_t ld, const float* keys, float* sums, int64_t d, int64_t from,
                                int64_t to) {
  using V = typename Vector<kWidth>::Type;
  V part[kKeys][kGroup];
  for (int p = 0; p < kKeys; p++)
    for (int r = 0; r < kGroup; r++) part[p][r] = load<kWidth>(sums + (p * kGroup + r) * kWidth);
  for (int64_t i = from; i < to; i += kWidth) {
    V key[kKeys];
    for (int p = 0; p < kKeys; p++) key[p] = load<kWidth>(keys + p * d + i);
#pragma GCC unroll 8
    for (int r = 0; r < kGroup; r++) {
      V v = load<kWidth>(x + r * ld + i);
      asm("" : "+v"(v));  // or the compiler loads it once for each product
      for (int p = 0; p < kKeys; p++) part[p][r] += v * key[p];
    }
  }
  for (int p = 0; p < kKeys; p++)
    for (int r = 0; r < kGroup; r++) store<kWidth>(sums + (p * kGroup + r) * kWidth, part[p][r]);
}

// scores[r][j] = x[r] . keys[j]. `sums` holds kWidth partial sums for each of them, which are added up at the end.
template <int kWidth, int kGroup, int kKeys>
TIMEROME_INLINE void score_block(const float* x, int64_t ld, int rows, const float* keys, float* sums, float* scores,
                                 int64_t d, int64_t n) {
  const int64_t size = kGroup * kWidth, whole = d / kWidth * kWidth;
  std::fill(sums, sums + rows * n * kWidth, 0.0f);
  for (int64_t from = 0; from < whole; from += kSlice) {
    const int64_t to = std::min(from + kSlice, whole);
    for (int r = 0; r < rows; r += kGroup) {
      float* sum = sums + r * n * kWidth;
      int64_t j = 0;
      for (; j + kKeys <= n; j += kKeys)
        score_keys<kWidth, kGroup, kKeys>(x + r * ld, ld, keys + j * d, sum + j * size, d, from, to);
      for (; j < n; j++) score_keys<kWidth, kGroup, 1>(x + r * ld, ld, keys + j * d, sum + j * size, d, from, to);
    }
  }
  for (int64_t r = 0; r < rows; r++)
    for (int64_t j = 0; j < n; j++) {
      float rest = 0;
      for (int64_t i = whole; i < d; i++) rest += x[r * ld + i] * keys[j * d + i];
      scores[r * n + j] = rest + total<kWidth>(sums + (r / kGroup * n + j) * size + r % kGroup * kWidth);
    }
}

// Where a residual of which everything is kept goes: out = h + alpha residual, for rows that have an out.
struct Sums {
  const float* h[kBlock];
  float* out[kBlock];
  float alpha;
};
template <class V>
TIMEROME_INLINE void add_at(const Sums& to, int row, int64_t i, const V& residual) {
  V x, product = to.alpha * residual;
  asm("" : "+v"(product));  // in two roundings, as elsewhere
  std::memcpy(&x, to.h[row] + i, sizeof x);
  x += product;
  std::memcpy(to.out[row] + i, &x, sizeof x);
}

// Asks for kStep columns of a row, which are needed once all rows are through with the columns before: so many rows at
// a time no processor follows by itself.
template <int64_t kStep>
TIMEROME_INLINE void fetch_ahead(const Sums& to, int row, int64_t i) {
  if (!to.out[row]) return;
  for (int64_t k = i; k < i + kStep; k += 16) {
    __builtin_prefetch(to.h[row] + k, 0, 2);
    __builtin_prefetch(to.out[row] + k, 1, 2);
  }
}

// One tile: the kVectors vectors from column i on of kGroup rows, of whose coefficients `c` holds the first's. `values`
// are those of the tile's columns, `pitch` apart.
template <int kWidth, int kGroup, int kVectors, bool kAdd>
TIMEROME_INLINE void expand_tile(const float* c, int64_t ldc, const float* values, int64_t pitch, float* residual,
                                 int64_t ld, int first, int64_t i, int64_t m, const Sums* to) {
  using V = typename Vector<kWidth>::Type;
  V sum[kGroup][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kGroup; r++)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v++) sum[r][v] = V{};
  for (int64_t j = 0; j < m; j++) {
    V value[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v++) value[v] = load<kWidth>(values + j * pitch + v * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < kGroup; r++)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; v++) sum[r][v] += c[r * ldc + j] * value[v];
  }
#pragma GCC unroll 8
  for (int r = 0; r < kGroup; r++)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v++) {
      if constexpr (!kAdd)
        store<kWidth>(residual + (first + r) * ld + i + v * kWidth, sum[r][v]);
      else if (to->out[first + r])
        add_at(*to, first + r, i + v * kWidth, sum[r][v]);
    }
}

// kTiles tiles side by side, of all rows.
template <int kWidth, int kGroup, int kVectors, int kTiles, bool kAdd>
TIMEROME_INLINE void expand_columns(const float* c, int64_t ldc, const float* values, float* residual, int64_t ld,
                                    int rows, int64_t i, int64_t d, int64_t m, const Sums* to) {
  constexpr int64_t tile = kVectors * kWidth, step = kTiles * tile;
  const float* from = values + i;
  int64_t pitch = d;
  alignas(64) float near[kTiles > 1 ? kMost * step : 1];
  if constexpr (kTiles > 1) {  // powers of two apart, values push each other out of the cache before all rows used them
    for (int64_t j = 0; j < m; j++)
#pragma GCC unroll 8
      for (int64_t k = 0; k < step; k += kWidth) store<kWidth>(near + j * step + k, load<kWidth>(from + j * d + k));
    from = near;
    pitch = step;
  }
  for (int first = 0; first < rows; first += kGroup) {
    if constexpr (kAdd)
      for (int r = first; r < first + kGroup; r++) fetch_ahead<step>(*to, r, i + step);
    for (int64_t k = 0; k < step; k += tile)
      expand_tile<kWidth, kGroup, kVectors, kAdd>(c + first * ldc, ldc, from + k, pitch, residual, ld, first, i + k, m,
                                                  to);
  }
}

// residual[r] = sum over m of c[r][m] values[m], or what becomes of it. Rows of c are `ldc` apart.
template <int kWidth, int kGroup, int kVectors, int kTiles, bool kAdd>
TIMEROME_INLINE void expand_block(const float* c, int64_t ldc, const float* values, float* residual, int64_t ld,
                                  int rows, int64_t d, int64_t m, const Sums* to) {
  constexpr int64_t step = kTiles * kVectors * kWidth, small = 2 * kWidth;
  int64_t i = 0;
  for (; i + step <= d; i += step)
    expand_columns<kWidth, kGroup, kVectors, kTiles, kAdd>(c, ldc, values, residual, ld, rows, i, d, m, to);
  if constexpr (small < step)
    for (; i + small <= d; i += small)
      expand_columns<kWidth, kGroup, 2, 1, kAdd>(c, ldc, values, residual, ld, rows, i, d, m, to);
  for (int r = 0; r < rows; r++)
    for (int64_t k = i; k < d; k++) {
      float sum = 0;
      for (int64_t j = 0; j < m; j++) sum += c[r * ldc + j] * values[j * d + k];
      if constexpr (!kAdd)
        residual[r * ld + k] = sum;
      else if (to->out[r])
        add_at(*to, r, k, sum);
    }
}

// The same for each instruction set: the width of its vectors; rows and keys that are scored together; rows and vectors
// of a tile, and tiles side by side. Multiply-add in one rounding where the processor has it, as in a BLAS product.
#define TIMEROME_TARGET(isa) __attribute__((target("arch=" isa), optimize("fp-contract=fast")))
#define TIMEROME_SCORE(isa, name, width, group, keys)                                                              \
  TIMEROME_TARGET(isa)                                                                                             \
  void score_##name(const float* x, int64_t ld, int r, const float* k, float* t, float* s, int64_t d, int64_t n) { \
    score_block<width, group, keys>(x, ld, r, k, t, s, d, n);                                                      \
  }
#define TIMEROME_EXPAND(isa, name, width, group, vectors, tiles)                                                       \
  TIMEROME_TARGET(isa)                                                                                                 \
  void expand_##name(const float* c, int64_t ldc, const float* v, float* r, int64_t ld, int n, int64_t d, int64_t m) { \
    expand_block<width, group, vectors, tiles, false>(c, ldc, v, r, ld, n, d, m, nullptr);                             \
  }                                                                                                                    \
  TIMEROME_TARGET(isa)                                                                                                 \
  void expand_into_##name(const float* c, int64_t ldc, const float* v, const Sums& to, int n, int64_t d, int64_t m) {  \
    expand_block<width, group, vectors, tiles, true>(c, ldc, v, nullptr, 0, n, d, m, &to);                             \
  }
// With 16 registers of vectors.
TIMEROME_SCORE("x86-64-v3", v3, 8, 4, 3)
TIMEROME_EXPAND("x86-64-v3", v3, 8, 4, 3, 2)

#ifdef TIMEROME_AVX512
// With 32. Eight rows a power of two apart, and three keys, push each other out of a cache of eight ways.
TIMEROME_SCORE("x86-64-v4", v4_narrow, 16, 4, 4)
TIMEROME_SCORE("x86-64-v4", v4, 16, 8, 3)
TIMEROME_EXPAND("x86-64-v4", v4, 16, 4, 6, 1)

const bool is_v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                   __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512cd");
const auto score = !is_v4 ? score_v3 : TIMEROME_FIRST_CACHE_WAYS < 12 ? score_v4_narrow : score_v4;
const auto expand = is_v4 ? expand_v4 : expand_v3;
const auto expand_into = is_v4 ? expand_into_v4 : expand_into_v3;
#else
const auto score = score_v3;
const auto expand = expand_v3;
const auto expand_into = expand_into_v3;
#endif
const bool is_v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");

TIMEROME_CLONES float norm(const float* x, int64_t d) {
  float part[64] = {};
  int64_t i = 0;
  for (; i + 64 <= d; i += 64)
    for (int l = 0; l < 64; l++) part[l] += x[i + l] * x[i + l];
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

// Columns of the coefficients, so many that expand works on whole vectors only.
int64_t padded(int64_t m) { return (m + 31) / 32 * 32; }

int filled(int rows) { return (rows + kRows - 1) / kRows * kRows; }

// What one thread needs: rows start at whole cache lines, and not all in the same few sets of the cache. Once scored, x
// gives way to the residual.
struct Scratch {
  int64_t ld;
  float *x, *some, *sums, *scores, *c;
  static int64_t pitch(int64_t d) { return (d + 15) / 16 * 16 + 16; }
  static int64_t size(int64_t d, int64_t n, int64_t m) {
    return (kBlock + 1) * pitch(d) + kBlock * (17 * n + padded(m)) + 16;
  }
  Scratch(float* memory, int64_t d, int64_t n) : ld(pitch(d)) {
    x = memory + (64 - reinterpret_cast<uintptr_t>(memory) % 64) % 64 / sizeof(float);
    some = x + kBlock * ld;
    sums = some + ld;
    scores = sums + kBlock * n * 16;
    c = scores + kBlock * n;
  }
};

// One block: the rows of h in `place`, at most kBlock. Rows of coef are padded. Returns, as bits, which of them were
// edited.
unsigned edit_block(const LowrankCpu& a, const int64_t* place, int rows, const float* coef, const float* key_norm,
                    const Scratch& s) {
  const int64_t bytes = a.d * element_size(a.dtype);
  const int full = filled(rows);
  const auto row = [&](const void* base, int r) { return static_cast<const char*>(base) + place[r] * bytes; };
  const auto out = [&](int r) { return static_cast<char*>(a.out) + place[r] * bytes; };
  // Rows one after another are scored where they lie.
  const bool as_is = a.dtype == 0 && !a.mean && rows == full && place[rows - 1] - place[0] == rows - 1;
  const float* x = s.x;
  int64_t ld = s.ld;
  if (as_is) {
    x = reinterpret_cast<const float*>(row(a.h, 0)), ld = a.d;
  } else {
    for (int r = 0; r < rows; r++) load_row_cpu(row(a.h, r), a.mean, s.x + r * ld, a.d, a.dtype);
    std::fill(s.x + rows * ld, s.x + full * ld, 0.0f);
  }
  score(x, ld, full, a.keys, s.sums, s.scores, a.d, a.n);
  unsigned edited = 0;
  for (int r = 0; r < rows; r++) {
    if (!a.gated || passes(s.scores + r * a.n, key_norm, norm(x + r * ld, a.d), a.tau, a.m))
      edited |= 1u << r;
    else if (a.out != a.h)
      std::memcpy(out(r), row(a.h, r), size_t(bytes));
  }
  if (!edited) return 0;
  const int64_t columns = padded(a.m);
  expand(s.scores, a.n, coef, s.c, columns, full, columns, a.n);
  if (a.k >= a.d && a.dtype == 0) {
    Sums to = {{}, {}, a.alpha};
    for (int r = 0; r < rows; r++)
      if (edited >> r & 1)
        to.h[r] = reinterpret_cast<const float*>(row(a.h, r)), to.out[r] = reinterpret_cast<float*>(out(r));
    expand_into(s.c, columns, a.values, to, full, a.d, a.m);
    return edited;
  }
  expand(s.c, columns, a.values, s.x, s.ld, full, a.d, a.m);
  for (int r = 0; r < rows; r++)
    if (edited >> r & 1) sparsify_add_row_cpu(row(a.h, r), s.x + r * s.ld, out(r), a.d, a.k, a.alpha, a.dtype, s.some);
  return edited;
}

// A thread is woken for about 50 microseconds of work.
int threads_for(int64_t rows, int64_t d, int64_t products, int most) {
  return int(std::max<int64_t>(1, std::min<int64_t>(most, rows * d * (products + 8) / (1 << 20))));
}

#endif  // TIMEROME_X86

}  // namespace

#ifdef TIMEROME_X86

bool lowrank_cpu_supported() { return is_v3; }

void lowrank_cpu(const LowrankCpu& a) {
  std::vector<float> key_norm;
  if (a.gated)
    for (int64_t j = 0; j < a.m; j++) key_norm.push_back(norm(a.keys + j * a.d, a.d));
  std::vector<float> coef(size_t(a.n * padded(a.m)));
  for (int64_t i = 0; i < a.n; i++) std::copy_n(a.coef + i * a.coef_stride, a.m, coef.data() + i * padded(a.m));
  const int64_t size = Scratch::size(a.d, a.n, a.m), bytes = a.d * element_size(a.dtype);
  const int threads = threads_for(a.last - a.first, a.d, a.n, a.threads);
  const std::unique_ptr<float[]> scratch(new float[size_t(threads * size)]);  // nothing may throw in the parallel loop
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
#endif
  {
#ifdef _OPENMP
    const Scratch s(scratch.get() + omp_get_thread_num() * size, a.d, a.n);
#pragma omp for schedule(dynamic)
#else
    const Scratch s(scratch.get(), a.d, a.n);
#endif
    for (int64_t start = a.first; start < a.last; start += kBlock) {
      int64_t place[kBlock];
      int rows = 0;
      for (int64_t t = start; t < std::min(start + kBlock, a.last); t++) {
        if (!a.mask || a.mask[t])
          place[rows++] = t;
        else if (a.out != a.h)
          std::memcpy(static_cast<char*>(a.out) + t * bytes, static_cast<const char*>(a.h) + t * bytes, size_t(bytes));
      }
      if (!rows) continue;
      const unsigned edited = edit_block(a, place, rows, coef.data(), key_norm.data(), s);
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
  const std::unique_ptr<float[]> scratch(new float[size_t(threads * size)]);  // nothing may throw in the parallel loop
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
#endif
  {
#ifdef _OPENMP
    const Scratch s(scratch.get() + omp_get_thread_num() * size, a.d, 0);
#pragma omp for schedule(dynamic)
#else
    const Scratch s(scratch.get(), a.d, 0);
#endif
    for (int64_t start = 0; start < a.count; start += kBlock) {
      const int rows = int(std::min<int64_t>(kBlock, a.count - start)), full = filled(rows);
      const float* c = a.c + start * a.m;
      if (rows < full) {
        std::copy(c, c + rows * a.m, s.c);
        std::fill(s.c + rows * a.m, s.c + full * a.m, 0.0f);
        c = s.c;
      }
      expand(c, a.m, a.values, s.x, s.ld, full, a.d, a.m);
      for (int r = 0; r < rows; r++) {
        const int64_t at = (a.index ? a.index[start + r] : a.first + start + r) * bytes;
        sparsify_add_row_cpu(static_cast<const char*>(a.h) + at, s.x + r * s.ld, static_cast<char*>(a.out) + at, a.d,
                             a.k, a.alpha, a.dtype, s.some);
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
