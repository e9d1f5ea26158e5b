// A loaded weight -> e4m3, K-major, padded, with a scale for each output feature: which kernel, and
// its launch.
#include <algorithm>

#include "once_per_device.h"
#include "weight_columns.cuh"
#include "weight_rows.cuh"

namespace jaxfp8 {
namespace {

using WeightKernel = void (*)(WeightProblem const);

template <class T>
WeightKernel pick(bool in_out, int bytes) {
  return by_bytes<T>(bytes, [=](auto constant) -> WeightKernel {
    return in_out ? weight_columns<T, constant.value> : weight_rows<T, constant.value>;
  });
}

template <class T>
int stage_bytes(int bytes) {
  return by_bytes<T>(bytes, [](auto constant) { return Tiles<T, constant.value>::kStageBytes; });
}

template <class T>
char const* launch(WeightProblem const& p) {
  auto multiples = static_cast<uint64_t>(p.in_out ? p.n : p.k) * sizeof(T);
  for (int i = 0; i < p.count; ++i) multiples |= reinterpret_cast<uintptr_t>(p.w[i]);
  int const bytes = bytes_at_once(multiples);
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kCluster, 1, 1};
  config.stream = p.stream;
  if (p.in_out) {
    config.gridDim = dim3((p.n_pad + kStrip - 1) / kStrip * kCluster, p.stack, p.count);
    config.blockDim = dim3(kThreadsOfTile);
    config.dynamicSmemBytes = stage_bytes<T>(bytes);
    config.attrs = &cluster;
    config.numAttrs = 1;
  } else {
    int const chunks = (p.k_pad + Chunk<T>::kSize - 1) / Chunk<T>::kSize;
    config.gridDim = dim3(p.measured != nullptr ? p.n : p.n_pad, p.stack, p.count);
    config.blockDim = dim3(std::min((chunks + 31) / 32 * 32, kThreadsOfRow));
  }
  cudaError_t const status = cudaLaunchKernelEx(&config, pick<T>(p.in_out, bytes), p);
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

template <class T>
cudaError_t load_modules() {
  for (bool in_out : {false, true}) {
    for (int bytes : {16, 8, 4, 2}) {
      cudaError_t const status = cudaFuncSetAttribute(
          reinterpret_cast<void const*>(pick<T>(in_out, bytes)),
          cudaFuncAttributeMaxDynamicSharedMemorySize, in_out ? stage_bytes<T>(bytes) : 0);
      if (status != cudaSuccess) return status;
    }
  }
  return cudaSuccess;
}

char const* load_all_modules() {
  for (cudaError_t status :
       {load_modules<__nv_bfloat16>(), load_modules<__half>(), load_modules<float>()}) {
    if (status != cudaSuccess) return cudaGetErrorString(status);
  }
  return nullptr;
}

}  // namespace

char const* weight_launch(WeightProblem const& problem) {
  static OncePerDevice once;
  if (char const* why = once.call(load_all_modules)) return why;
  switch (problem.in) {
    case In::kBF16: return launch<__nv_bfloat16>(problem);
    case In::kF16: return launch<__half>(problem);
    default: return launch<float>(problem);
  }
}

}  // namespace jaxfp8
