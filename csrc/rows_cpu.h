// Work on one row, shared by the CPU kernels. dtype codes are those of kernels.h.
#pragma once
#include <cstdint>

namespace timerome {

// x[i] = h[i] - mean[i] in float32; mean may be null.
void load_row_cpu(const void* h, const float* mean, float* x, int64_t d, int dtype);

// out[i] = h[i] + alpha * r[i] on the k largest |r|, h[i] elsewhere; `scratch` has room for d + 16 values.
void sparsify_add_row_cpu(const void* h, const float* r, void* out, int64_t d, int64_t k, float alpha, int dtype,
                          float* scratch);

inline int64_t element_size(int dtype) { return dtype == 0 ? 4 : 2; }

}  // namespace timerome
