// Reading x, 16 bytes a thread.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace jaxfp8 {

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
    // NOTES: to_float of the upper one is two instructions, of which the compiler does the first
    // before the row's maximum is known: 16 registers more for four chunks.
    uint32_t const pair = reinterpret_cast<uint32_t const*>(chunk.v)[i / 2];
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  } else {
    return {to_float(chunk.v[i]), to_float(chunk.v[i + 1])};
  }
}

// How many bytes are read at once where addresses and pitches, or'ed together, are `multiples`.
inline int bytes_at_once(uint64_t multiples) {
  return multiples % 16 == 0 ? 16 : static_cast<int>(multiples & -multiples);
}

// pick(bytes as a constant), for the numbers of bytes at which a T can begin.
template <class T, class Pick>
auto by_bytes(int bytes, Pick pick) {
  switch (bytes) {
    case 16: return pick(std::integral_constant<int, 16>{});
    case 8: return pick(std::integral_constant<int, 8>{});
    case 4: return pick(std::integral_constant<int, 4>{});
    default: return pick(std::integral_constant<int, sizeof(T)>{});
  }
}

// kBytes from `from` to `to`, if inside: a predicated load, and no branch.
// NOTES: of five branches around a load each, ptxas made four predicates and waited for those loads
// before it asked for the fifth: 4096x8192 took 32.9 us with 5 chunks a thread and 25.2 with 4.
template <int kBytes>
__device__ void load_if(bool inside, void const* from, void* to) {
  int const predicate = inside;
  if constexpr (kBytes == 16) {
    auto& v = *static_cast<uint4*>(to);
    asm volatile(
        "{\n.reg .pred inside;\nsetp.ne.b32 inside, %5, 0;\n"
        "@inside ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
        : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
        : "l"(from), "r"(predicate));
  } else if constexpr (kBytes == 8) {
    auto& v = *static_cast<uint2*>(to);
    asm volatile(
        "{\n.reg .pred inside;\nsetp.ne.b32 inside, %3, 0;\n"
        "@inside ld.global.nc.v2.u32 {%0, %1}, [%2];\n}"
        : "+r"(v.x), "+r"(v.y)
        : "l"(from), "r"(predicate));
  } else if constexpr (kBytes == 4) {
    asm volatile(
        "{\n.reg .pred inside;\nsetp.ne.b32 inside, %2, 0;\n@inside ld.global.nc.u32 %0, [%1];\n}"
        : "+r"(*static_cast<uint32_t*>(to))
        : "l"(from), "r"(predicate));
  } else {
    static_assert(kBytes == 2);
    asm volatile(
        "{\n.reg .pred inside;\nsetp.ne.b32 inside, %2, 0;\n@inside ld.global.nc.u16 %0, [%1];\n}"
        : "+h"(*static_cast<uint16_t*>(to))
        : "l"(from), "r"(predicate));
  }
}

// A chunk of a row of k numbers, zeros where it is outside of the row, read by kBytes, which divide
// the row's address and its bytes.
//
// NOTES: by 8 bytes a row of 3420 takes what one of 3424 takes by 16. Read by the 16 aligned bytes
// that hold it, with codes passed to the neighbouring thread, 16x3420 took 1.98 us and takes 1.62,
// 512x3420 2.70 and 2.33, 1024x3420 3.73 and 3.08; with a chunk of 8 bytes a thread 3.6 there
// (H200, 2026-12-01).
template <int kBytes, class T>
__device__ Chunk<T> load_chunk(T const* row, int start, int k) {
  constexpr int kNumbers = kBytes / sizeof(T);
  Chunk<T> chunk;
  reinterpret_cast<uint4&>(chunk) = {};
#pragma unroll
  for (int i = 0; i < Chunk<T>::kSize; i += kNumbers) {
    load_if<kBytes>(start + i < k, row + start + i, chunk.v + i);
  }
  return chunk;
}

}  // namespace jaxfp8
