// What happens to each result: the activation, and the rounding to what is stored.
#pragma once

#include "cute/tensor.hpp"
#include "cutlass/numeric_conversion.h"
#include "gemm.h"

// The rounding is done (round_to_16_bits below): what is left is to take each pair's 32 bits.
template <int kSize, cutlass::FloatRoundStyle kRound>
struct cutlass::NumericArrayConverter<uint16_t, float, kSize, kRound> {
  static_assert(kSize % 2 == 0);
  CUTLASS_DEVICE cutlass::Array<uint16_t, kSize> operator()(
      cutlass::Array<float, kSize> const& values) const {
    cutlass::Array<uint16_t, kSize> bits;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kSize; i += 2) {
      uint32_t const pair = __float_as_uint(values[i]);
      bits[i] = static_cast<uint16_t>(pair);
      bits[i + 1] = static_cast<uint16_t>(pair >> 16);
    }
    return bits;
  }
};

namespace jaxfp8 {

// NOTES: the activation is a run-time argument, uniform over the grid, so one kernel serves all
// four. gelu in its tanh form and silu are both z / (1 + 2^t) with t an odd polynomial of z,
// because (1 + tanh u) / 2 = 1 / (1 + exp(-2u)); so they share a few instructions an element. That
// is also more accurate than 1 + tanh where that cancels: CUTLASS's GELU_taylor, on tanh.approx, is
// 20 % off at z = -3; this is 1e-6 off there and 2e-5 at most. (With tanhf and expf in four
// branches the epilogue was so long that small GEMMs lost 10 %.)
template <class Values>
CUTLASS_DEVICE void activate(Values& z, Activation kind) {
  if (kind == Activation::kNone) return;
  if (kind == Activation::kRelu) {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < cute::size(z); ++i) z(i) = z(i) < 0.f ? 0.f : z(i);  // keeps NaN
    return;
  }
  constexpr float kLog2E = 1.4426950408889634f;
  constexpr float kSqrt2OverPi = 0.7978845608028654f;
  bool const gelu = kind == Activation::kGelu;
  float const first = gelu ? -2.f * kSqrt2OverPi * kLog2E : -kLog2E;
  float const third = gelu ? 0.044715f * first : 0.f;
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < cute::size(z); ++i) {
    // Bounded, or silu's 0·inf would be NaN at z = inf.
    float const square = fminf(z(i) * z(i), 1e8f);
    float const t = z(i) * fmaf(third, square, first);
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(t));
    z(i) = __fdividef(z(i), 1.f + power);
  }
}

// Two results as 16 bits each, in the first of the two: both are stored together.
template <class Values>
CUTLASS_DEVICE void round_to_16_bits(Values& z, bool float16) {
  auto const rounded = [&](auto convert) {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < cute::size(z); i += 2) {
      uint32_t pair;
      convert(pair, z(i), z(i + 1));
      z(i) = __uint_as_float(pair);
    }
  };
  if (float16) {
    rounded([](uint32_t& pair, float low, float high) {
      asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    });
  } else {
    rounded([](uint32_t& pair, float low, float high) {
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    });
  }
}

// For CUTLASS's saturating conversion to e4m3, which would make infinity 448: NaN, as where x is
// quantized under a static scale (quantize.cu).
template <class Values>
CUTLASS_DEVICE void divide(Values& z, float scale) {
  float const reciprocal = __fdiv_rn(1.f, scale);
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < cute::size(z); ++i) {
    z(i) = isinf(z(i)) ? nanf("") : __fmul_rn(z(i), reciprocal);
  }
}

}  // namespace jaxfp8
