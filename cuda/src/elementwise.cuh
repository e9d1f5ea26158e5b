// What happens to each result: the activation, and the rounding to what is stored.
#pragma once

#include "cutlass/array.h"
#include "gemm.h"

namespace jaxfp8 {

// NOTES: the activation is a run-time argument, uniform over the grid, so one kernel serves all
// four. gelu in its tanh form and silu are both z / (1 + 2^t) with t an odd polynomial of z,
// because (1 + tanh u) / 2 = 1 / (1 + exp(-2u)): a few instructions an element. That is also more
// accurate than 1 + tanh where that cancels: CUTLASS's GELU_taylor, on tanh.approx, is 20 % off at
// z = -3; this is 1e-6 off there and 2e-5 at most. (With tanhf and expf the epilogue was so long
// that small GEMMs lost 10 %.) z = inf gives inf and -inf NaN, as jax.nn's formulas do. Tried, of
// no use: one reciprocal for two quotients of 1 + 2^-|t|, which takes five instructions more
// (4096x3424x1280 1.02 of the time; H200, 2026-11-30).
template <int kSize>
CUTLASS_DEVICE void activate(cutlass::Array<float, kSize>& z, Activation kind) {
  if (kind == Activation::kNone) return;
  if (kind == Activation::kRelu) {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kSize; ++i) z[i] = z[i] < 0.f ? 0.f : z[i];  // keeps NaN
    return;
  }
  constexpr float kLog2E = 1.4426950408889634f;
  constexpr float kSqrt2OverPi = 0.7978845608028654f;
  // z / (1 + 2^t)
  auto const quotient = [](float z, float t) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(t));
    return __fdividef(z, 1.f + power);
  };
  if (kind == Activation::kGelu) {
    constexpr float kFirst = -2.f * kSqrt2OverPi * kLog2E, kThird = 0.044715f * kFirst;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kSize; ++i) z[i] = quotient(z[i], z[i] * fmaf(kThird, z[i] * z[i], kFirst));
  } else {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kSize; ++i) z[i] = quotient(z[i], z[i] * -kLog2E);
  }
}

// Two neighbours as 16 bits each, the first in the lower half.
template <int kSize>
CUTLASS_DEVICE cutlass::Array<uint32_t, kSize / 2> rounded_to_16_bits(
    cutlass::Array<float, kSize> const& z, bool float16) {
  cutlass::Array<uint32_t, kSize / 2> pairs;
  auto const round = [&](auto convert) {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kSize / 2; ++i) convert(pairs[i], z[2 * i], z[2 * i + 1]);
  };
  if (float16) {
    round([](uint32_t& pair, float low, float high) {
      asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    });
  } else {
    round([](uint32_t& pair, float low, float high) {
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    });
  }
  return pairs;
}

// The other way.
CUTLASS_DEVICE cutlass::Array<float, 2> from_16_bits(uint32_t pair, bool float16) {
  if (!float16) return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  cutlass::Array<float, 2> two;
  asm("{\n .reg .b16 low, high;\n mov.b32 {low, high}, %2;\n cvt.f32.f16 %0, low;\n"
      " cvt.f32.f16 %1, high;\n}" : "=f"(two[0]), "=f"(two[1]) : "r"(pair));
  return two;
}

// For CUTLASS's saturating conversion to e4m3, which would make infinity 448: NaN, as where x is
// quantized under a static scale (quantize.cu).
template <int kSize>
CUTLASS_DEVICE void divide(cutlass::Array<float, kSize>& z, float scale) {
  float const reciprocal = __fdiv_rn(1.f, scale);
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < kSize; ++i) {
    z[i] = isinf(z[i]) ? nanf("") : __fmul_rn(z[i], reciprocal);
  }
}

}  // namespace jaxfp8
