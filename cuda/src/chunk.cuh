// Reading x, 16 bytes a thread.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

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

// Two neighbouring numbers of a chunk, i even.
template <class T>
__device__ float2 two_of(Chunk<T> const& chunk, int i) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    // NOTES: to_float of the upper one is two instructions, of which the compiler does the first before
    // the row's maximum is known: 16 registers more for four chunks.
    uint32_t const pair = reinterpret_cast<uint32_t const*>(chunk.v)[i / 2];
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  } else {
    return {to_float(chunk.v[i]), to_float(chunk.v[i + 1])};
  }
}

// A predicated load, and no branch.
// NOTES: of five branches around a load each, ptxas made four predicates and waited for those loads
// before it asked for the fifth: 4096x8192 took 32.9 us with 5 chunks a thread and 25.2 with 4.
template <class T>
__device__ void load_if(bool inside, T const* from, uint4& to) {
  asm volatile(
      "{\n.reg .pred inside;\nsetp.ne.b32 inside, %5, 0;\n"
      "@inside ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "+r"(to.x), "+r"(to.y), "+r"(to.z), "+r"(to.w)
      : "l"(from), "r"(static_cast<int>(inside)));
}

// A chunk of a row of k numbers, zeros where it is outside of the row.
//
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
  auto& bytes = reinterpret_cast<uint4&>(chunk);
  bytes = {};
  if constexpr (kLoad == Load::k16Bytes) {
    load_if(start < k, row + start, bytes);
  } else if (start >= 0 && start + Chunk<T>::kSize <= k) {
    bytes = __ldg(reinterpret_cast<uint4 const*>(row + start));
  } else {
    constexpr int kHalf = Chunk<T>::kSize / 2;  // k is a multiple of it, so a half is never split
    auto* const halves = reinterpret_cast<uint2*>(&chunk);
    int const half = start < 0 ? 1 : 0, at = start + half * kHalf;
    if (at < k) halves[half] = __ldg(reinterpret_cast<uint2 const*>(row + at));
  }
  return chunk;
}

// The same of a row that is not the last, by the 16 aligned bytes everywhere: at an end of the row half
// of them are the neighbour's, until `clear_outside`. To be called for all chunks first, as it looks
// at them.
//
// NOTES: with 4 chunks a thread 4096x3420 takes 10.0 us; with the row's ends loaded apart 10.2, and 11.1
// by predicated loads into the same registers, which wait for one another (4096x3424: 8.8; H200,
// 2026-11-30).
template <class T>
__device__ Chunk<T> load_aligned(T const* row, int start, int k) {
  Chunk<T> chunk;
  auto& bytes = reinterpret_cast<uint4&>(chunk);
  bytes = {};
  load_if(start < k, row + start, bytes);
  return chunk;
}

template <class T>
__device__ void clear_outside(Chunk<T>& chunk, int start, int k) {
  auto& bytes = reinterpret_cast<uint4&>(chunk);
  if (start < 0) bytes.x = bytes.y = 0;
  if (start + Chunk<T>::kSize / 2 >= k) bytes.z = bytes.w = 0;
}

// Whether a row of an array that is read by `kLoad` begins in the middle of 16 aligned bytes.
template <class T, Load kLoad>
__device__ bool is_shifted(T const* row) {
  return kLoad == Load::k8Bytes && reinterpret_cast<uintptr_t>(row) % 16 != 0;
}

}  // namespace jaxfp8
