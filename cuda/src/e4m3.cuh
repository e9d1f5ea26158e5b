// e4m3 numerics, to the bit those of jaxfp8/quantize.py: maxima, scales, saturating casts.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "chunk.cuh"

namespace jaxfp8 {

// The constants of jaxfp8/quantize.py; a GPU test holds both to the same bits.
constexpr float kInvFp8Max = 1.f / 448.f;
constexpr float kMinScale = 1.17549435e-38f;  // 2^-126

// |x| as ordered bits: infinity is above every number and NaN above infinity, so a plain integer
// maximum keeps both, where fmaxf would lose the NaN. Two 16-bit numbers go through at once.
template <class T>
struct Amax;

template <class T>
struct Amax16 {
  uint32_t pair = 0;
  __device__ void add(Chunk<T> const& chunk) {
    auto const* words = reinterpret_cast<uint32_t const*>(chunk.v);
#pragma unroll
    for (int i = 0; i < 4; ++i) pair = __vmaxu2(pair, words[i] & 0x7fff7fffu);
  }
  __device__ uint32_t float_bits() const {
    auto const bits = static_cast<uint16_t>(max(pair & 0xffffu, pair >> 16));
    return __float_as_uint(to_float(reinterpret_cast<T const&>(bits))) & 0x7fffffffu;
  }
};
template <>
struct Amax<__nv_bfloat16> : Amax16<__nv_bfloat16> {};
template <>
struct Amax<__half> : Amax16<__half> {};

template <>
struct Amax<float> {
  uint32_t bits = 0;
  __device__ void add(Chunk<float> const& chunk) {
#pragma unroll
    for (float v : chunk.v) bits = max(bits, __float_as_uint(v) & 0x7fffffffu);
  }
  __device__ uint32_t float_bits() const { return bits; }
};

// max / 448; 1 below 2^-126.
__device__ inline float scale_of_amax(float amax) {
  float scale = __fmul_rn(amax, kInvFp8Max);
  if (scale < kMinScale) scale = 1.f;  // false for NaN, which stays,
  if (isnan(scale)) scale = __uint_as_float(0x7fc00000u);  // in numpy's pattern
  return scale;
}

// The e4m3 codes of a chunk, as many bytes as it has numbers.
template <class T>
struct alignas(Chunk<T>::kSize) Codes {
  uint32_t words[Chunk<T>::kSize / 4];
};

// Codes of x * reciprocal; 0 from the chunk's number `valid` on, also where the scale is NaN.
//
// NOTES: the saturating conversion turns NaN into 0x7f, but infinity into 448. Where the scale is
// the row's own, an infinite x has met an infinite scale and is 0·inf = NaN already; under a static
// scale it must be made NaN here.
template <bool kStatic, class T>
__device__ Codes<T> encode(Chunk<T> const& chunk, float reciprocal, int valid) {
  Codes<T> codes;
  auto const pair = [&](int i) -> uint32_t {
    float2 x = two_of(chunk, i);
    if constexpr (kStatic) {
      if (isinf(x.x)) x.x = nanf("");
      if (isinf(x.y)) x.y = nanf("");
    }
    float2 const scaled = {__fmul_rn(x.x, reciprocal), __fmul_rn(x.y, reciprocal)};
    return __nv_cvt_float2_to_fp8x2(scaled, __NV_SATFINITE, __NV_E4M3);
  };
#pragma unroll
  for (int i = 0; i < Chunk<T>::kSize; i += 4) codes.words[i / 4] = pair(i) | pair(i + 2) << 16;
  if (valid < Chunk<T>::kSize) {
    // All bytes at once: pair by pair it was a third of the kernel's instructions.
    uint64_t const mask = valid > 0 ? (uint64_t{1} << 8 * valid) - 1 : 0;
#pragma unroll
    for (int i = 0; i < Chunk<T>::kSize / 4; ++i) {
      codes.words[i] &= static_cast<uint32_t>(mask >> 32 * i);
    }
  }
  return codes;
}

// The chunk at `at` of a row of k numbers, to its place in the row `to` of k_pad codes.
template <bool kStatic, class T>
__device__ void store_chunk(Chunk<T> const& chunk, float reciprocal, int at, int k, int k_pad,
                            uint8_t* to) {
  Codes<T> const codes = encode<kStatic>(chunk, reciprocal, k - at);
  if (at < k_pad) *reinterpret_cast<Codes<T>*>(to + at) = codes;
}

}  // namespace jaxfp8
