// What kernels use beyond plain CUDA C++. The emulator of the tests defines the guard and has its own of these.
#ifndef TIMEROME_DEVICE_CUH
#define TIMEROME_DEVICE_CUH

#include <cstdint>

namespace timerome {

// The shared memory whose size is given at the launch.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

// The tensor cores' sum (16, 8) += a (16, 16) b (16, 8), bfloat16 in pairs, spread over a warp.
__device__ __forceinline__ void mma(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same in double precision: sum (8, 8) += a (8, 4) b (4, 8).
__device__ __forceinline__ void mma(double (&sum)[2], double a, double b) {
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
      : "+d"(sum[0]), "+d"(sum[1])
      : "d"(a), "d"(b));
}

// The number stays the same, but what was made of it before is not kept for what is made of it after this, which would
// take registers.
__device__ __forceinline__ void make_anew(float& x) { asm volatile("" : "+f"(x)); }

// Sixteen bytes on their way to shared memory, zeros if not valid; what is committed together arrives together.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
  const uint32_t address = uint32_t(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all but the last `left` commits have arrived, 0 to 3 of them.
__device__ __forceinline__ void copy_async_wait(int left) {
  switch (left) {
    case 3:
      asm volatile("cp.async.wait_group 3;" ::: "memory");
      break;
    case 2:
      asm volatile("cp.async.wait_group 2;" ::: "memory");
      break;
    case 1:
      asm volatile("cp.async.wait_group 1;" ::: "memory");
      break;
    default:
      asm volatile("cp.async.wait_group 0;" ::: "memory");
  }
}

// Of two kernels in a row, from sm_90 on: the first lets blocks of the second come as soon as there is room, and the
// second waits until all that the first writes can be read. Before that the second comes when the first is done.
__device__ __forceinline__ void allow_next_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_last_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace timerome

#endif
