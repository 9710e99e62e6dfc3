// What kernels use beyond plain CUDA C++. The emulator of the tests defines the guard and has its own of these.
#ifndef TIMEROME_DEVICE_CUH
#define TIMEROME_DEVICE_CUH

namespace timerome {

// The shared memory whose size is given at the launch.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

}  // namespace timerome

#endif
