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

// NOTES: of rows whose pitch is 8 bytes past a multiple of 16, every other one is shifted: it begins
// in the middle of 16 aligned bytes. Its chunks begin half a chunk before where they would (the
// first at -kSize / 2), so that all but those at the row's ends are 16 aligned bytes; store_chunk puts
// their halves together again. Read by 8 bytes, 4096x3420 took 2.0 us more than 4096x3424 does, 9.7 us
// (H200, 2026-11-22). No loaded value is looked at here: a thread at a row's end that waited for its
// half would hold up its warp.
template <class T, Load kLoad>
__device__ Chunk<T> load_chunk(T const* row, int start, int k) {
  Chunk<T> chunk;
  if constexpr (kLoad == Load::kElements) {
#pragma unroll
    for (int i = 0; i < Chunk<T>::kSize; ++i) chunk.v[i] = start + i < k ? row[start + i] : T(0.f);
    return chunk;
  }
  constexpr int kHalf = Chunk<T>::kSize / 2;
  auto& bytes = reinterpret_cast<uint4&>(chunk);
  bytes = {};
  bool const first = start >= 0 && start < k;
  bool const second = start + kHalf < k;  // k is a multiple of kHalf, so a half is never split
  if (first && (second || kLoad == Load::k16Bytes)) {
    bytes = __ldg(reinterpret_cast<uint4 const*>(row + start));
  }
  if constexpr (kLoad == Load::k8Bytes) {
    auto* const halves = reinterpret_cast<uint2*>(&chunk);
    if (first && !second) halves[0] = __ldg(reinterpret_cast<uint2 const*>(row + start));
    if (!first && second) halves[1] = __ldg(reinterpret_cast<uint2 const*>(row + start + kHalf));
  }
  return chunk;
}

// Whether a row of an array that is read by `kLoad` begins in the middle of 16 aligned bytes.
template <class T, Load kLoad>
__device__ bool is_shifted(T const* row) {
  return kLoad == Load::k8Bytes && reinterpret_cast<uintptr_t>(row) % 16 != 0;
}

}  // namespace jaxfp8
