// The epilogue: out = activation(lhs_scale * (rhs_scale * acc) + bias), in float32, rounded once.
#pragma once

#include "cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp"
#include "direct_store.cuh"
#include "gemm.h"

namespace jaxfp8 {

// NOTES: the activation is a run-time argument, uniform over the grid, so one kernel serves all
// four; it costs no spill on any tile compiled (-Xptxas -v). gelu in its tanh form and silu are both
// z / (1 + 2^t) with t an odd polynomial of z, because (1 + tanh u) / 2 = 1 / (1 + exp(-2u)); so
// they share a few instructions an element. That is also more accurate than 1 + tanh where that
// cancels: CUTLASS's GELU_taylor, on tanh.approx, is 20 % off at z = -3; this is 1e-6 off there and 2e-5 at most. (With
// tanhf and expf in four branches the epilogue was so long that small GEMMs lost 10 %.)
struct ActivationArguments {
  Activation kind = Activation::kNone;
};

// Sm90Compute asks the functor of one float for its Arguments, and calls that of an array.
template <class T>
struct RuntimeActivation {
  using Arguments = ActivationArguments;
};

template <int N>
struct RuntimeActivation<cutlass::Array<float, N>> {
  using Arguments = ActivationArguments;

  CUTLASS_DEVICE cutlass::Array<float, N> operator()(cutlass::Array<float, N> const& z,
                                                      Arguments const& args) const {
    cutlass::Array<float, N> y = z;
    if (args.kind == Activation::kNone) return y;
    if (args.kind == Activation::kRelu) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < N; ++i) y[i] = z[i] < 0.f ? 0.f : z[i];  // keeps NaN
      return y;
    }
    constexpr float kLog2E = 1.4426950408889634f;
    constexpr float kSqrt2OverPi = 0.7978845608028654f;
    bool const gelu = args.kind == Activation::kGelu;
    float const first = gelu ? -2.f * kSqrt2OverPi * kLog2E : -kLog2E;
    float const third = gelu ? 0.044715f * first : 0.f;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < N; ++i) {
      // Bounded, or silu's 0·inf would be NaN at z = inf.
      float const square = fminf(z[i] * z[i], 1e8f);
      float const t = z[i] * fmaf(third, square, first);
      y[i] = __fdividef(z[i], 1.f + exp2_approx(t));
    }
    return y;
  }

  CUTLASS_DEVICE static float exp2_approx(float t) {
    float e;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(t));
    return e;
  }
};

// A vector along one axis of the tile, or one value: told at run time by a boolean stride.
template <class Tile>
using AlongRows = cutlass::epilogue::fusion::Sm90ColBroadcast<
    0, Tile, float, float, cute::Stride<bool, cute::_0, cute::_0>>;
template <class Tile>
using AlongColumns = cutlass::epilogue::fusion::Sm90RowBroadcast<
    0, Tile, float, float, cute::Stride<cute::_0, bool, cute::_0>>;

template <class Tile, class Element, Operands kOperands>
struct Epilogue {
  static constexpr bool kSwapped = kOperands == Operands::kSwapped;
  static constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;

  // NOTES: swapped, the features run along the rows of the tile and the tokens along its columns.
  using PerToken = cute::conditional_t<kSwapped, AlongColumns<Tile>, AlongRows<Tile>>;
  using PerFeature = cute::conditional_t<kSwapped, AlongRows<Tile>, AlongColumns<Tile>>;

  template <template <class> class Op, class To = float>
  using Compute = cutlass::epilogue::fusion::Sm90Compute<Op, To, float, kRound>;
  template <class Node, class... Children>
  using EVT = cutlass::epilogue::fusion::Sm90EVT<Node, Children...>;

  using Scaled = EVT<Compute<cutlass::multiplies>, PerFeature,
                     cutlass::epilogue::fusion::Sm90AccFetch>;
  using Affine = EVT<Compute<cutlass::homogeneous_multiply_add>, PerToken, Scaled, PerFeature>;
  using Rounded = EVT<Compute<RuntimeActivation, Element>, Affine>;
  using Direct = DirectStore<Element, kSwapped>;
  using Callbacks = EVT<Direct, Rounded>;

  template <class Node>
  static typename Node::Arguments vector(float const* data, bool is_vector) {
    if constexpr (cute::is_same_v<Node, AlongRows<Tile>>) {
      return {data, 0.f, {is_vector, cute::_0{}, cute::_0{}}};
    } else {
      return {data, 0.f, {cute::_0{}, is_vector, cute::_0{}}};
    }
  }

  // Children first, then the node's own arguments, as in the types above.
  static typename Callbacks::Arguments arguments(GemmProblem const& p, bool direct) {
    return {
        {
            {
                vector<PerToken>(p.lhs_scale, p.per_token),
                {vector<PerFeature>(p.rhs_scale, p.per_channel), {}, {}},
                vector<PerFeature>(p.bias, true),
                {},
            },
            {p.activation},
        },
        {direct ? static_cast<Element*>(p.out) : nullptr, p.out_pitch},
    };
  }
};

}  // namespace jaxfp8
