// Launcher of lowrank_cluster_kernel.cuh.
#include <algorithm>
#include <atomic>

#include "cuda_common.cuh"
#include "kernels.h"
#include "lowrank_cluster_kernel.cuh"

namespace timerome {
namespace {

using Kernel = void (*)(const LowrankCuda);

struct Launch {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute cluster = {};

  Launch(int blocks, int bytes, cudaStream_t stream) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {unsigned(blocks), 1, 1};
    config.gridDim = unsigned(blocks), config.blockDim = kLowrankThreads;
    config.dynamicSmemBytes = size_t(bytes), config.stream = stream;
    config.attrs = &cluster, config.numAttrs = 1;
  }
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;
};

// How many clusters the device can run at once; asked once, 0 where it has none or the kernel was not built for it.
int clusters_at_once(Kernel kernel, int device, int blocks, int shared) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices][kMaxBlocks];  // plus one
  std::atomic<int>* const place = device < kDevices ? &known[device][blocks - 1] : nullptr;
  if (place && place->load()) return place->load() - 1;
  int has_clusters = 0, clusters = 0;
  cudaFuncAttributes attributes;
  cudaDeviceGetAttribute(&has_clusters, cudaDevAttrClusterLaunch, device);
  if (has_clusters && cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90) {
    const Launch launch(blocks, shared, nullptr);
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config) != cudaSuccess) clusters = 0;
  }
  cudaGetLastError();  // a question that failed is no failure
  if (place) place->store(clusters + 1);
  return clusters;
}

}  // namespace

int lowrank_cluster_cuda(const LowrankCuda& arguments, int device, void* stream, bool* taken) {
  LowrankCuda a = arguments;
  *taken = false;
  if (a.dtype != 2 || a.keys_dtype != 2 || a.values_dtype != 2 || a.d > kMaxBlocks * kSlice) return cudaSuccess;
  const Kernel kernel = a.mean ? lowrank_cluster_kernel<3> : lowrank_cluster_kernel<1>;
  int shared = 0;
  cudaError_t error = shared_limit(device, &shared);
  if (error == cudaSuccess) error = allow_shared(kernel, shared);
  if (error != cudaSuccess) return error;
  a.blocks = int((a.d + kSlice - 1) / kSlice);
  const int64_t clusters = clusters_at_once(kernel, device, a.blocks, shared), tiles = (a.rows + 15) / 16;
  if (clusters == 0) return cudaSuccess;
  const auto bytes = [&] { return ClusterLayout(a.tiles, a.blocks, int(a.n), int(a.m)).bytes; };
  a.tiles = 1;
  while (a.tiles < kMaxTiles && a.tiles * clusters < tiles) a.tiles *= 2;
  while (a.tiles > 1 && bytes() > shared) a.tiles /= 2;
  if (bytes() > shared) return cudaSuccess;

  const auto on = static_cast<cudaStream_t>(stream);
  error = cudaMemsetAsync(a.hits, 0, size_t(a.rows / a.length) * sizeof *a.hits, on);
  if (error != cudaSuccess) return error;
  Launch launch(a.blocks, bytes(), on);
  launch.config.gridDim = unsigned(std::min(clusters, (tiles + a.tiles - 1) / a.tiles) * a.blocks);
  *taken = true;
  return cudaLaunchKernelEx(&launch.config, kernel, static_cast<const LowrankCuda&>(a));
}

}  // namespace timerome
