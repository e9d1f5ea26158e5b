// A loaded [N, K] weight -> e4m3, padded: an output feature is a row, and a block's. Its second
// read finds it in a cache.
#pragma once

#include "chunk.cuh"
#include "e4m3.cuh"
#include "weight.h"

namespace jaxfp8 {

constexpr int kThreadsOfRow = 256;

// The maximum of |x| over a block's row, of which `load` gives the thread's chunks.
template <class T, class LoadChunk>
__device__ float row_amax(int k_pad, LoadChunk load) {
  __shared__ uint32_t warp_amax[kThreadsOfRow / 32];
  Amax<T> mine;
  int const step = blockDim.x * Chunk<T>::kSize;
#pragma unroll 4
  for (int base = 0; base < k_pad; base += step) mine.add(load(base));
  uint32_t amax = __reduce_max_sync(0xffffffffu, mine.float_bits());
  int const lane = threadIdx.x % 32;
  if (lane == 0) warp_amax[threadIdx.x / 32] = amax;
  __syncthreads();
  amax = __reduce_max_sync(0xffffffffu, lane < blockDim.x / 32 ? warp_amax[lane] : 0u);
  return __uint_as_float(amax);
}

// Block (x: output feature, padding included; y: matrix of the stack; z: weight).
template <class T, int kBytes>
__global__ void __launch_bounds__(kThreadsOfRow)
    weight_rows(__grid_constant__ WeightProblem const p) {
  constexpr int kSize = Chunk<T>::kSize;
  int const n = blockIdx.x, start = threadIdx.x * kSize, step = blockDim.x * kSize;
  int const which = blockIdx.z;
  int64_t const padded = static_cast<int64_t>(blockIdx.y) * p.n_pad + n;
  int64_t const logical = static_cast<int64_t>(blockIdx.y) * p.n + n;
  int64_t const in_all = static_cast<int64_t>(which) * p.stack * p.n + logical;
  auto* to = static_cast<uint8_t*>(p.q[which]) + padded * p.k_pad;
  if (n >= p.n) {
    for (int at = start; at < p.k_pad; at += step) {
      *reinterpret_cast<Codes<T>*>(to + at) = {};
    }
    if (threadIdx.x == 0) p.scale[which][padded] = 1.f;
    return;
  }
  T const* row = static_cast<T const*>(p.w[which]) + logical * p.k;
  auto const load = [&](int base) { return load_chunk<kBytes>(row, base + start, p.k); };
  float const scale =
      p.given != nullptr ? p.given[in_all] : scale_of_amax(row_amax<T>(p.k_pad, load));
  if (threadIdx.x == 0) *(p.measured ? p.measured + in_all : p.scale[which] + padded) = scale;
  if (p.measured != nullptr) return;
  float const reciprocal = __fdiv_rn(1.f, scale);
#pragma unroll 4
  for (int base = 0; base < p.k_pad; base += step) {
    store_chunk<false>(load(base), reciprocal, base + start, p.k, p.k_pad, to);
  }
}

}  // namespace jaxfp8
