// What every CUDA launcher needs.
#pragma once
#include <cuda_runtime.h>

namespace timerome {

// Makes `device` current and puts the previous one back: torch must find the device it left.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&previous_);
    if (error_ == cudaSuccess && previous_ != device) {
      error_ = cudaSetDevice(device);
      restore_ = error_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (restore_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t error() const { return error_; }

 private:
  cudaError_t error_;
  int previous_ = 0;
  bool restore_ = false;
};

// How much shared memory one block may have on the device.
inline cudaError_t shared_limit(int device, int* bytes) {
  return cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

// Lets a kernel have that much. Always all of it: a smaller value could come between another thread's and its launch.
template <class Kernel>
cudaError_t allow_shared(Kernel kernel, int limit) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
}

}  // namespace timerome
