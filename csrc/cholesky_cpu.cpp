// Growing and shrinking a Cholesky factor by one row, in float64, in O(n^2). One thread: n is a few hundred.
#include <algorithm>
#include <cmath>
#include <vector>

#include "clones.h"
#include "kernels.h"

namespace timerome {
namespace {

// Thirty-two partial sums, so that the compiler may vectorise without being allowed to reorder sums in general.
TIMEROME_CLONES double dot(const double* x, const double* y, int64_t n) {
  double part[32] = {};
  int64_t i = 0;
  for (; i + 32 <= n; i += 32)
    for (int j = 0; j < 32; j++) part[j] += x[i + j] * y[i + j];
  double sum = 0;
  for (; i < n; i++) sum += x[i] * y[i];
  for (int width = 16; width > 0; width /= 2)
    for (int j = 0; j < width; j++) part[j] += part[j + width];
  return sum + part[0];
}

}  // namespace

int cholesky_append_cpu(const double* L, int64_t ldl, const double* g, double gnn, double* out, int64_t ldo, int64_t n) {
  double* last = out + n * ldo;  // the new row: L x = g, then the pivot sqrt(gnn - x.x)
  for (int64_t i = 0; i < n; i++) {
    const double* row = L + i * ldl;
    double* to = out + i * ldo;
    if (!(row[i] > 0) || !std::isfinite(row[i])) return 2;
    if (to != row) std::fill(std::copy(row, row + i + 1, to), to + n, 0.0);
    to[n] = 0.0;
    last[i] = (g[i] - dot(row, last, i)) / row[i];
  }
  const double pivot = gnn - dot(last, last, n);
  if (!(pivot > 0) || !std::isfinite(pivot)) return 1;
  last[n] = std::sqrt(pivot);
  return 0;
}

// With row j gone, the rows below it keep their columns before j; their trailing block B, which had
// B B^T + x x^T = (the wanted Gram block) with x the dropped column, gets x rotated into it:
// for each column c, a rotation of (B_cc, x_c) onto (hypot, 0), applied to all rows below.
void cholesky_delete_cpu(const double* L, double* out, int64_t n, int64_t j) {
  const int64_t m = n - 1, tail = n - 1 - j;
  std::vector<double> cosine(tail), sine(tail);
  for (int64_t i = 0; i < m; i++) {
    const double* from = L + (i < j ? i : i + 1) * n;
    double* to = out + i * m;
    std::fill(std::copy(from, from + std::min(i + 1, j), to), to + m, 0.0);
    if (i < j) continue;
    double x = from[j];
    const int64_t b = i - j;  // this row's index in the trailing block
    for (int64_t c = 0; c < b; c++) {
      const double l = from[j + 1 + c];
      to[j + c] = cosine[c] * l + sine[c] * x;
      x = cosine[c] * x - sine[c] * l;
    }
    const double diagonal = std::hypot(from[j + 1 + b], x);
    cosine[b] = from[j + 1 + b] / diagonal;
    sine[b] = x / diagonal;
    to[j + b] = diagonal;
  }
}

}  // namespace timerome
