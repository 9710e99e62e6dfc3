// What CUDA can be used here. Called on the first CUDA tensor, never at import: a CUDA call before a fork breaks
// workers.
#include "cuda_common.cuh"
#include "kernels.h"

namespace timerome {

int cuda_device_count(int* count) { return cudaGetDeviceCount(count); }

int cuda_versions(int* runtime, int* driver) {
  const cudaError_t error = cudaRuntimeGetVersion(runtime);
  return error != cudaSuccess ? error : cudaDriverGetVersion(driver);
}

const char* cuda_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace timerome
