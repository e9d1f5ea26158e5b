// Reading x, 16 bytes a thread.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace jaxfp8 {

// How a 16-byte chunk of x is read: what the row pitch is a multiple of.
enum class Load { k16Bytes, k8Bytes, kElements };

__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(float v) { return v; }

// One thread's share of a row: 16 bytes of x.
template <class T>
struct alignas(16) Chunk {
  static constexpr int kSize = 16 / sizeof(T);
  T v[kSize];
};

// NOTES: of rows whose pitch is 8 bytes past a multiple of 16, every other one begins in the middle
// of 16 aligned bytes. There a thread reads the 16 that end with the first half of its chunk, and
// takes the second half from its neighbour (`shift`). By 8 bytes a read, 4096x3420 took 2.0 us more
// than 4096x3424 does, 9.7 us (H200, 2026-11-22).
template <class T, Load kLoad>
__device__ Chunk<T> load_chunk(T const* row, int start, int k, bool shifted) {
  Chunk<T> chunk;
  if constexpr (kLoad == Load::kElements) {
#pragma unroll
    for (int i = 0; i < Chunk<T>::kSize; ++i) chunk.v[i] = start + i < k ? row[start + i] : T(0.f);
    return chunk;
  }
  constexpr int kHalf = Chunk<T>::kSize / 2;
  int const at = shifted ? start - kHalf : start;
  bool const first = at >= 0 && at < k;
  bool const second = at + kHalf < k;  // k is a multiple of kHalf, so a half is never split
  uint4 bytes{};
  if (first && (second || kLoad == Load::k16Bytes)) {
    bytes = __ldg(reinterpret_cast<uint4 const*>(row + at));
  } else if (first || second) {
    uint2 const half = __ldg(reinterpret_cast<uint2 const*>(row + at + (first ? 0 : kHalf)));
    (first ? bytes.x : bytes.z) = half.x;
    (first ? bytes.y : bytes.w) = half.y;
  }
  reinterpret_cast<uint4&>(chunk) = bytes;
  return chunk;
}

// The chunk at `start` out of what was read around it; the last lane of a warp reads the rest.
template <class T>
__device__ Chunk<T> shift(Chunk<T> const& chunk, T const* row, int start, int k) {
  constexpr int kHalf = Chunk<T>::kSize / 2;
  auto const& own = reinterpret_cast<uint4 const&>(chunk);
  uint2 next{};
  bool const last_lane = threadIdx.x % 32 == 31;
  if (last_lane && start + kHalf < k) {
    next = __ldg(reinterpret_cast<uint2 const*>(row + start + kHalf));
  }
  uint32_t const x = __shfl_down_sync(0xffffffffu, own.x, 1);
  uint32_t const y = __shfl_down_sync(0xffffffffu, own.y, 1);
  Chunk<T> shifted;
  reinterpret_cast<uint4&>(shifted) = {own.z, own.w, last_lane ? next.x : x,
                                       last_lane ? next.y : y};
  return shifted;
}

}  // namespace jaxfp8
