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
    config.gridDim = unsigned(blocks), config.blockDim = kClusterThreads;
    config.dynamicSmemBytes = size_t(bytes), config.stream = stream;
    config.attrs = &cluster, config.numAttrs = 1;
  }
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;
};

template <int kKeyTiles>
Kernel kernel_of(bool has_mean) {
  return has_mean ? lowrank_cluster_kernel<3, kKeyTiles> : lowrank_cluster_kernel<1, kKeyTiles>;
}

// How many clusters the device can run at once; asked once, 0 where it has none or the kernel was not built for it.
int clusters_at_once(Kernel kernel, int device, int blocks, int shared, bool two) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices][kMaxBlocks][2];  // plus one
  std::atomic<int>* const place = device < kDevices ? &known[device][blocks - 1][two] : nullptr;
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
  const int key_tiles = a.n <= 16 ? 2 : a.n <= 40 ? 5 : 8, steps = (key_tiles + 1) / 2;
  const Kernel kernel = key_tiles == 2 ? kernel_of<2>(a.mean) : key_tiles == 5 ? kernel_of<5>(a.mean) : kernel_of<8>(a.mean);
  int shared = 0, of_two = 0;
  cudaError_t error = shared_limit(device, &shared);
  if (error == cudaSuccess) error = shared_of_two_blocks(device, &of_two);
  if (error == cudaSuccess) error = allow_shared(kernel, shared);
  if (error != cudaSuccess) return error;
  a.blocks = int((a.d + kSlice - 1) / kSlice);
  const auto bytes = [&](int tiles) { return ClusterLayout(tiles, a.blocks, int(a.n), int(a.m), steps).bytes; };
  // As many rows at once as fit, but not more than there is to do for all clusters.
  const int64_t tiles = (a.rows + 15) / 16;
  int64_t clusters = 0;
  for (a.tiles = kMaxTiles; a.tiles > 0; a.tiles--) {
    if (bytes(a.tiles) > shared) continue;
    const bool two = bytes(a.tiles) <= of_two;
    clusters = clusters_at_once(kernel, device, a.blocks, two ? of_two : shared, two);
    if (a.tiles == 1 || tiles > (a.tiles - 1) * clusters) break;
  }
  if (a.tiles == 0 || clusters == 0) return cudaSuccess;

  const auto on = static_cast<cudaStream_t>(stream);
  error = cudaMemsetAsync(a.hits, 0, size_t(a.rows / a.length) * sizeof *a.hits, on);
  if (error != cudaSuccess) return error;
  Launch launch(a.blocks, bytes(a.tiles), on);
  launch.config.gridDim = unsigned(std::min(clusters, (tiles + a.tiles - 1) / a.tiles) * a.blocks);
  *taken = true;
  return cudaLaunchKernelEx(&launch.config, kernel, static_cast<const LowrankCuda&>(a));
}

}  // namespace timerome
