// Launcher of the kernels in lowrank_score.cuh and lowrank_apply.cuh.
#include <algorithm>

#include "cuda_common.cuh"
#include "kernels.h"
#include "lowrank_apply.cuh"

namespace timerome {
namespace {

constexpr int kStatic = 1 << 10;  // more than apply_small's variables take

struct Device {
  int shared = 0, processors = 0, major = 0;
  cudaError_t error;

  explicit Device(int device) {
    error = shared_limit(device, &shared);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  }
};

int64_t groups(int64_t rows) { return (rows + kScoreRows - 1) / kScoreRows; }

// So many parts of the columns that there is a block for each multiprocessor.
int splits(int64_t rows, int64_t d, int dtype, int processors) {
  const int64_t columns = kStageBytes / (dtype == 0 ? 4 : 2), stages = (d + columns - 1) / columns;
  return int(std::clamp<int64_t>(processors / groups(rows), 1, stages));
}

cudaError_t launch_score(LowrankCuda& a, const Device& device, cudaStream_t stream) {
  return for_score_kernel(a, [&](auto kernel, int64_t stage) {
    a.stages = int(std::min<int64_t>(4, device.shared / stage));
    const int64_t shared = std::max(a.stages * stage, score_sums_bytes(int(a.n)));
    if (a.stages == 0 || shared > device.shared) return cudaErrorInvalidValue;
    const cudaError_t error = allow_shared(kernel, device.shared);
    if (error != cudaSuccess) return error;
    kernel<<<unsigned(groups(a.rows) * a.splits + kPrepareBlocks), kLowrankThreads, size_t(shared), stream>>>(a);
    return cudaGetLastError();
  });
}

cudaError_t launch_apply(const LowrankCuda& a, const Device& device, cudaStream_t stream) {
  const int most = device.shared - kStatic;
  // Values are read once for two sets; where blocks have no more than one each, more blocks do better.
  const bool many = a.rows > kSetRows * int64_t(device.processors);
  const int sets = many && apply_small_shared_bytes<2>(int(a.d), int(a.n), int(a.m)) <= most ? 2 : 1;
  return for_apply_kernel(a, sets, [&](auto kernel, auto taken) {
    constexpr int kSets = decltype(taken)::value;
    const cudaError_t error = allow_shared(kernel, most);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute early = {};  // blocks may come before those of the scores are gone
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = unsigned(apply_small_blocks<kSets>(a.rows, device.processors));
    config.blockDim = kLowrankThreads;
    config.dynamicSmemBytes = size_t(apply_small_shared_bytes<kSets>(int(a.d), int(a.n), int(a.m)));
    config.stream = stream;
    config.attrs = &early, config.numAttrs = device.major >= 9;
    return cudaLaunchKernelEx(&config, kernel, a);
  });
}

}  // namespace

int lowrank_cuda_max_d(int device, int64_t n, int64_t m, int64_t* d) {
  const Device of(device);
  const auto fits = [&](int64_t wide) {
    return apply_small_shared_bytes<1>(int(wide), int(n), int(m)) <= of.shared - kStatic;
  };
  for (*d = kLowrankCudaMaxD; *d > 0 && !fits(*d);) *d -= kApplyColumns;
  return of.error;
}

int lowrank_cuda_scratch(int64_t rows, int64_t d, int64_t n, int dtype, int device, int64_t* floats) {
  const Device of(device);
  if (of.error == cudaSuccess) *floats = splits(rows, d, dtype, of.processors) * rows * (score_columns(int(n)) + 1) + n;
  return of.error;
}

int lowrank_cuda(const LowrankCuda& arguments, int device, void* stream_) {
  LowrankCuda a = arguments;
  if (a.rows == 0) return cudaSuccess;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  const auto stream = static_cast<cudaStream_t>(stream_);
  const Device of(device);
  if (of.error != cudaSuccess) return of.error;
  if (a.n > kLowrankCudaMaxN || a.d > kLowrankCudaMaxD || a.d % 32 ||
      apply_small_shared_bytes<1>(int(a.d), int(a.n), int(a.m)) > of.shared - kStatic)
    return cudaErrorInvalidValue;
  a.splits = splits(a.rows, a.d, a.dtype, of.processors);
  a.scores = a.scratch;
  a.row_squares = a.scores + a.splits * a.rows * score_columns(int(a.n));
  a.key_norms = a.row_squares + a.splits * a.rows;
  const cudaError_t error = launch_score(a, of, stream);
  return error == cudaSuccess ? launch_apply(a, of, stream) : error;
}

}  // namespace timerome
