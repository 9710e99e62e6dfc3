// Entry points of the compiled extension: plain addresses and sizes, no torch, no Python.
//
// dtype codes: 0 float32, 1 float16, 2 bfloat16. Matrices are row-major and contiguous. CUDA entry points return a
// cudaError_t as int (0 is success) and run on the given device and stream; they leave the current device as it was.
#pragma once
#include <cstdint>

namespace timerome {

// out[t, :] = h[t, :] + alpha * r[t, :] on the k largest |r[t, :]|, h[t, :] elsewhere. mask may be null; out may be h.
void sparsify_add_cpu(const void* h, const float* r, void* out, const uint8_t* mask, int64_t rows, int64_t d, int64_t k,
                      float alpha, int dtype, int threads);

// out = h + alpha S_k((h - mean) K^T A D) on the rows first .. last - 1 that mask and gate let through, h elsewhere:
// all of it in one pass, for few keys.
struct LowrankCpu {
  const void* h;
  const float* keys;    // (n, d)
  const float* coef;    // (n, m), rows coef_stride apart
  const float* values;  // (m, d)
  const float* mean;    // (d), may be null
  const uint8_t* mask;  // by row, may be null
  void* out;            // may be h
  int64_t* hits;        // by sequence of `length` rows: how many were let through, added to what is there
  int64_t first, last, length, d, n, m, coef_stride, k;
  float alpha, tau;
  bool gated;
  int dtype, threads;
};
bool lowrank_cpu_supported();  // whether this processor has what it is written for
void lowrank_cpu(const LowrankCpu& arguments);

// out = h + alpha S_k(c D) on `count` rows: those from `first` on, or those that index names. The residual never leaves
// the cache. Where lowrank_cpu is supported.
struct ExpandAddCpu {
  const void* h;
  const float* c;        // (count, m)
  const float* values;   // (m, d)
  const int64_t* index;  // which rows of h and out, may be null
  void* out;             // may be h
  int64_t first, count, d, m, k;
  float alpha;
  int dtype, threads;
};
void expand_add_cpu(const ExpandAddCpu& arguments);

// Asks the system for large pages where memory has none yet; a wish that changes nothing but the time of first writes.
void prefer_large_pages(void* memory, int64_t bytes);

// out (n+1, n+1) = Cholesky factor of [[L L^T, g], [g^T, gnn]]; rows are ldl and ldo apart. Where L is the corner of out,
// only the new row and column are written. Returns 0; 1 when that is not positive definite, 2 when a diagonal entry of L
// is not positive and finite: then out is undefined, but for a corner that is L.
int cholesky_append_cpu(const double* L, int64_t ldl, const double* g, double gnn, double* out, int64_t ldo, int64_t n);

// out (n-1, n-1) = Cholesky factor of L L^T without row and column j. Cannot fail.
void cholesky_delete_cpu(const double* L, double* out, int64_t n, int64_t j);

constexpr int64_t kSparsifyAddCudaMaxD = 8192;  // the row lives in registers: 32 values a thread, 256 threads
int sparsify_add_cuda(const void* h, const float* r, void* out, const uint8_t* mask, int64_t rows, int64_t d, int64_t k,
                      float alpha, int dtype, int device, void* stream);

// out = h + alpha S_k((h - mean) K^T A D) for few keys, on the rows that mask and gate let through, out = h on the others;
// out may be h. d is a multiple of 32, matrices start on 16 bytes, keys and values are float32 or bfloat16.
struct LowrankCuda {
  const void* h;
  void* out;
  const void* keys;          // (n, d)
  const float* coef;         // (n, m)
  const void* values;        // (m, d)
  const float* mean;         // (d), may be null
  const uint8_t* mask;       // by row, may be null
  float* scratch;            // of lowrank_cuda_scratch floats
  unsigned long long* hits;  // rows let through, by sequence of `length` rows
  int64_t rows, length, d, n, m, k;
  float alpha, tau;
  bool gated;
  int dtype, keys_dtype, values_dtype;
  int splits, stages;  // set by the launcher, as is what follows: the columns of a row are shared out to so many blocks
  float *scores, *row_squares, *key_norms;  // (splits, rows, n rounded up to 8), (splits, rows), (n)
};
constexpr int64_t kLowrankCudaMaxN = 64, kLowrankCudaMaxD = 4096;
int lowrank_cuda_max_d(int device, int64_t n, int64_t m, int64_t* d);  // less where shared memory is short
int lowrank_cuda_scratch(int64_t rows, int64_t d, int64_t n, int dtype, int device, int64_t* floats);
int lowrank_cuda(const LowrankCuda& arguments, int device, void* stream);

// gram (splits, batch, n, n): K K^T in float64, each split over its share of the columns. keys (batch, n, d), d a multiple
// of 4, start on four entries; of entry b the rows from lengths[b] on count as zero, null for n.
constexpr int64_t kGramCudaMaxN = 64;
int gram_cuda_splits(int64_t batch, int64_t d, int device, int64_t* splits);  // how many keep the device busy
int gram_cuda(const void* keys, const int64_t* lengths, double* gram, int64_t batch, int64_t n, int64_t d, int64_t splits,
              int dtype, int device, void* stream);

// Inverse and Cholesky factor of G + rho I in float64, each system in the shared memory of one block of threads: the
// lower triangles of gram (batch, n, n), of which lengths (batch) says how much counts, null for n; ridge, info
// (systems) and inverse, cholesky (systems, n, n), systems a multiple of batch. The largest n depends on the device.
int ridge_cuda_max_n(int device, int64_t* n);
int ridge_cuda(const double* gram, const double* ridge, const int64_t* lengths, double* inverse, double* cholesky,
               int* info, int64_t systems, int64_t batch, int64_t n, int device, void* stream);

int cuda_device_count(int* count);
int cuda_versions(int* runtime, int* driver);
const char* cuda_error_string(int error);

}  // namespace timerome
