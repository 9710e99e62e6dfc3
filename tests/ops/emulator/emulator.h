// A CUDA block on the CPU, for tests: one fibre per CUDA thread, blocks run one after another on one OS thread.
//
// Include the CUDA headers that the kernel needs first, then this, then the kernel's header. It shows wrong arithmetic,
// wrong indices, divergent barriers, stray writes and most barriers that are missing; other races and timing it does
// not show, for which a GPU is needed.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <numeric>
#include <stdexcept>
#include <vector>

#define TIMEROME_DEVICE_CUH  // this file has its own of what csrc/device.cuh holds
#undef __shared__
#undef __global__
#undef __host__
#undef __device__
#undef __launch_bounds__
#undef __forceinline__
#define __shared__ static  // blocks run one after another, so one copy serves
#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace emulator {

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Fibre {
  ucontext_t context;  // to begin with; then jumps, which need no system call
  jmp_buf jump;
  bool has_begun;
  std::vector<char> stack = std::vector<char>(64 * 1024);
  State state;
  int turn = 0;
};

struct Index {
  int x;
};

inline std::vector<Fibre> fibres;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline int current;
inline Index block, grid;
inline int threads;
inline int votes[1024];
inline std::vector<uint64_t> shared;  // the shared memory whose size is given at the launch, and a guard behind it
constexpr uint64_t kGarbage = 0xfff1a5a5a5a5a5a5;  // a NaN, as float and as double

inline void run_body() {
  body();
  fibres[current].state = State::kDone;
  _longjmp(scheduler, 1);
}

__attribute__((noinline)) inline void resume() {
  if (_setjmp(scheduler)) return;
  Fibre& fibre = fibres[current];
  if (fibre.has_begun) _longjmp(fibre.jump, 1);
  fibre.has_begun = true;
  setcontext(&fibre.context);
}

__attribute__((noinline)) inline void wait(State barrier) {
  fibres[current].state = barrier;
  if (!_setjmp(fibres[current].jump)) _longjmp(scheduler, 1);
}

// Releases fibres [from, to) if all that are not done wait at this barrier.
inline bool release(State barrier, int from, int to) {
  bool any = false;
  for (int i = from; i < to; i++) {
    if (fibres[i].state == State::kDone) continue;
    if (fibres[i].state != barrier) return false;
    any = true;
  }
  for (int i = from; i < to; i++)
    if (fibres[i].state == barrier) fibres[i].state = State::kReady;
  return any;
}

inline void run_block() {
  if (int(fibres.size()) < threads) fibres.resize(threads);
  for (int i = 0; i < threads; i++) {
    Fibre& f = fibres[i];
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = f.stack.size();
    f.context.uc_link = nullptr;
    f.has_begun = false;
    f.state = State::kReady;
    f.turn = 0;
    makecontext(&f.context, run_body, 0);
  }
  // One warp after the other goes as far as it can, from the first on in even blocks, from the last on in odd ones: if
  // a barrier is missing, some thread comes far too early.
  const int warps = (threads + 31) / 32;
  for (;;) {
    for (int i = 0; i < warps; i++) {
      const int from = 32 * (block.x % 2 ? warps - 1 - i : i), to = std::min(from + 32, threads);
      do {
        for (current = from; current < to; current++)
          if (fibres[current].state == State::kReady) resume();
      } while (release(State::kAtWarpBarrier, from, to));
    }
    if (std::all_of(fibres.begin(), fibres.begin() + threads, [](Fibre& f) { return f.state == State::kDone; })) return;
    if (!release(State::kAtBlockBarrier, 0, threads))
      throw std::runtime_error("deadlock: threads wait at different barriers");
  }
}

template <class F>
void launch(int blocks, int threads_, int64_t shared_bytes, F kernel) {
  body = kernel;
  threads = threads_;
  grid = {blocks};
  const size_t words = (shared_bytes + 7) / 8;
  for (block.x = 0; block.x < blocks; block.x++) {
    shared.assign(words + 64, kGarbage);
    run_block();
    if (std::count(shared.begin() + words, shared.end(), kGarbage) != 64)
      throw std::runtime_error("a write behind the shared memory");
  }
}

}  // namespace emulator

namespace timerome {

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulator::shared.data());
}

}  // namespace timerome

#define threadIdx (emulator::Index{emulator::current})
#define blockIdx emulator::block
#define gridDim emulator::grid
#define __syncthreads() emulator::wait(emulator::State::kAtBlockBarrier)

inline int __syncthreads_or(int vote) {
  emulator::votes[emulator::current] = vote;
  __syncthreads();
  const int any = std::any_of(emulator::votes, emulator::votes + emulator::threads, [](int x) { return x != 0; });
  __syncthreads();
  return any;
}

using std::max;
using std::min;
inline int __ffs(unsigned x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = uint64_t(b) << 32 | a;
  uint32_t bytes = 0;
  for (int i = 0; i < 4; i++) bytes |= uint32_t(both >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return bytes;
}
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __fdividef(float a, float b) { return a / b; }
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

namespace emulator {

// Gives a value to the other lanes of the warp and calls `read` with those of all. Two sets of slots in turn, so that
// one barrier is enough: who comes to the next one has read this one.
template <class T, class F>
auto exchange(const T& value, F read) {
  static T slots[2][32][32];  // [turn][warp][lane]
  const int turn = fibres[current].turn ^= 1, warp = current / 32;
  slots[turn][warp][current % 32] = value;
  wait(State::kAtWarpBarrier);
  return read(slots[turn][warp]);
}

template <class T>
T shuffle(T value, int lane) {
  return exchange(value, [=](const T* of) { return 0 <= lane && lane < 32 ? of[lane] : value; });
}

}  // namespace emulator

#define __syncwarp() emulator::wait(emulator::State::kAtWarpBarrier)

template <class T>
T __shfl_up_sync(unsigned, T value, int offset) {
  return emulator::shuffle(value, emulator::current % 32 - offset);
}
template <class T>
T __shfl_down_sync(unsigned, T value, int offset) {
  return emulator::shuffle(value, emulator::current % 32 + offset);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  return emulator::shuffle(value, emulator::current % 32 ^ lanes);
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulator::shuffle(value, lane & 31);
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  return emulator::exchange(vote, [](const bool* of) {
    unsigned all = 0;
    for (int lane = 0; lane < 32; lane++) all |= unsigned(of[lane]) << lane;
    return all;
  });
}

template <class T>
T __reduce_add_sync(unsigned, T value) {
  return emulator::exchange(value, [](const T* of) { return std::accumulate(of, of + 32, T(0)); });
}
template <class T>
T __reduce_max_sync(unsigned, T value) {
  return emulator::exchange(value, [](const T* of) { return *std::max_element(of, of + 32); });
}

namespace timerome {

inline void make_anew(float&) {}

// Arrives at once: that a wait is missing is not seen.
inline void copy_async(void* to, const void* from, bool valid) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
    throw std::runtime_error("an address that is no multiple of 16");
  valid ? std::memcpy(to, from, 16) : std::memset(to, 0, 16);
}
inline void copy_async_commit() {}
inline void copy_async_wait(int) {}
inline void allow_next_launch() {}
inline void wait_for_last_launch() {}

// Which lane holds which entries is in the PTX manual under mma.m16n8k16. The sums are in float, in order.
inline void mma(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  const auto entry = [](uint32_t pair, int i) { return __uint_as_float(i ? pair & 0xffff0000u : pair << 16); };
  const int g = emulator::current % 32 / 4, q = emulator::current % 4;
  emulator::exchange(Operands{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, [&](const Operands* of) {
    for (int i = 0; i < 4; i++) {
      const int column = 2 * q + i % 2;
      for (int k = 0; k < 16; k++) {
        const int lane = k % 8 / 2, half = k / 8;
        sum[i] += entry(of[4 * g + lane].a[2 * half + i / 2], k % 2) * entry(of[4 * column + lane].b[half], k % 2);
      }
    }
    return 0;
  });
}

// The same in double precision, under mma.m8n8k4.
inline void mma(double (&sum)[2], double a, double b) {
  struct Operands {
    double a, b;
  };
  const int row = emulator::current % 32 / 4, column = 2 * (emulator::current % 4);
  emulator::exchange(Operands{a, b}, [&](const Operands* of) {
    for (int i = 0; i < 2; i++)
      for (int k = 0; k < 4; k++) sum[i] += of[4 * row + k].a * of[4 * (column + i) + k].b;
    return 0;
  });
}

}  // namespace timerome

template <class T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address += value;
  return old;
}
