// The epilogue: out = activation(lhs_scale * (rhs_scale * acc) + bias), in float32, rounded once.
#pragma once

#include "cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp"
#include "direct_store.cuh"
#include "gemm.h"

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

// The root of CUTLASS's epilogue tree, over the accumulator alone: all arithmetic is here, a
// subtile at a time.
// NOTES: CUTLASS's broadcast nodes read their vectors one after another, each waiting for memory
// while the GEMM is already done. Here the three are on their way together. With CUTLASS's nodes a
// 512x4096x256 GEMM took 5.0 us without an epilogue and 6.0 (swapped 6.5) with it (H200,
// 2026-11-22).
template <class Tile, class Element, Operands kOperands>
struct Finish : cutlass::epilogue::fusion::Sm90VisitorImpl<> {
  static constexpr bool kSwapped = kOperands == Operands::kSwapped;
  // Swapped, the features run along the rows of the tile and the tokens along its columns.
  static constexpr int kTokens = cute::size<kSwapped ? 1 : 0>(Tile{});
  static constexpr int kFeatures = cute::size<kSwapped ? 0 : 1>(Tile{});

  struct SharedStorage {
    alignas(16) float lhs_scale[kTokens];
    alignas(16) float rhs_scale[kFeatures];
    alignas(16) float bias[kFeatures];
  };

  struct Arguments {
    float const* lhs_scale = nullptr;  // [tokens] if per_token, [classes, tokens] with classes
    float const* rhs_scale = nullptr;  // [features] if per_channel
    float const* bias = nullptr;       // [features], or null
    bool per_token = false, per_channel = false;
    int features = 0;
    Activation activation = Activation::kNone;
    DirectStoreArguments<Element> direct;
  };
  using Params = Arguments;

  template <class ProblemShape>
  static constexpr Params to_underlying_arguments(ProblemShape const&, Arguments const& args,
                                                  void*) {
    return args;
  }

  template <class ProblemShape>
  static bool can_implement(ProblemShape const&, Arguments const&) {
    return true;
  }

  template <class ProblemShape>
  static size_t get_workspace_size(ProblemShape const&, Arguments const&) {
    return 0;
  }

  template <class ProblemShape>
  static cutlass::Status initialize_workspace(ProblemShape const&, Arguments const&, void*,
                                              cudaStream_t, cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  CUTLASS_HOST_DEVICE Finish() {}
  CUTLASS_HOST_DEVICE Finish(Params const& params, SharedStorage const& shared)
      : params(&params), shared(const_cast<SharedStorage*>(&shared)) {}

  Params const* params = nullptr;
  SharedStorage* shared = nullptr;

  template <class EpilogueTile, int kThreads, class PerToken, class PerFeature>
  struct Callbacks : cutlass::epilogue::fusion::EmptyConsumerStoreCallbacks {
    CUTLASS_DEVICE Callbacks(Params const& params, SharedStorage& shared, PerToken lhs_scale,
                             PerFeature rhs_scale, PerFeature bias, int tokens, int token,
                             int feature, int row_class, int thread)
        : params(params),
          shared(shared),
          lhs_scale(lhs_scale),
          rhs_scale(rhs_scale),
          bias(bias),
          tokens(tokens),
          token(token),
          feature(feature),
          row_class(row_class),
          thread(thread) {}

    static constexpr int kUnit = 16 / sizeof(Element);

    Params const& params;
    SharedStorage& shared;
    PerToken lhs_scale;           // this thread's share of the vectors in shared memory
    PerFeature rhs_scale, bias;
    int tokens;                   // of the result, or of a class of its rows
    int token, feature;           // where this tile of it begins; the feature may be negative
    int row_class;
    int thread;
    Element* staged = nullptr;

    CUTLASS_DEVICE void begin() {
      constexpr int kTokenTurns = (kTokens + kThreads - 1) / kThreads;
      constexpr int kFeatureTurns = (kFeatures + kThreads - 1) / kThreads;
      float l[kTokenTurns], r[kFeatureTurns], b[kFeatureTurns];
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kFeatureTurns; ++i) {
        int const f = feature + thread + i * kThreads;
        bool const inside = f >= 0 && f < params.features;
        r[i] = inside ? __ldg(params.rhs_scale + (params.per_channel ? f : 0)) : 0.f;
        b[i] = inside && params.bias != nullptr ? __ldg(params.bias + f) : 0.f;
      }
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kTokenTurns; ++i) {
        int const t = token + thread + i * kThreads;
        // Not __ldg: with dependent launch the quantize kernel wrote it after this kernel began.
        float const* at = params.lhs_scale + (params.per_token ? row_class * tokens + t : 0);
        l[i] = t < tokens ? *at : 0.f;
      }
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kFeatureTurns; ++i) {
        int const f = thread + i * kThreads;
        if (f < kFeatures) shared.rhs_scale[f] = r[i], shared.bias[f] = b[i];
      }
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kTokenTurns; ++i) {
        int const t = thread + i * kThreads;
        if (t < kTokens) shared.lhs_scale[t] = l[i];
      }
    }

    CUTLASS_DEVICE bool begin_sync_needed() const { return true; }

    template <class Accumulator, int kSize>
    CUTLASS_DEVICE auto visit(cutlass::Array<Accumulator, kSize> const&, int, int, int,
                              cutlass::Array<Accumulator, kSize> const& values) {
      return values;
    }

    // Called with all values of a subtile before it is staged, and the buffer it will be in.
    template <class Buffer, class Sync, class Fragments>
    CUTLASS_DEVICE void reduce(Buffer&& buffer, Sync const&, int epi_m, int epi_n, bool,
                               Fragments& fragments) {
      staged = cute::raw_pointer_cast(buffer.data());
      auto const mine = [&](auto const& vector) {
        auto const from = vector(cute::_, cute::_, cute::_, epi_m, epi_n);
        auto values = cute::make_tensor_like<float>(from);
        cute::copy(cute::filter_zeros(from), cute::filter_zeros(values));
        return values;
      };
      auto const l = mine(lhs_scale);
      auto const r = mine(rhs_scale);
      auto const b = mine(bias);
      auto z = cute::make_tensor(reinterpret_cast<float*>(fragments.data()),
                                 cute::make_layout(cute::size(l)));
      CUTE_STATIC_ASSERT_V(cute::size(l) == cute::size(b));
      static_assert(sizeof(typename Fragments::value_type) *
                        cute::size(typename Fragments::layout_type{}) ==
                    sizeof(float) * cute::size(typename decltype(l)::layout_type{}));
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < cute::size(z); ++i) z(i) = fmaf(l(i), r(i) * z(i), b(i));
      activate(z, params.activation);
    }

    // CUTLASS's own store, of a tensor of one element, writes 16 bytes (what TMA clips, it clips to
    // that): more than a row so narrow has. It must have happened before the next rows are written.
    CUTLASS_DEVICE void wait_for_the_one_element(bool issues_tma) {
      if (issues_tma) {
        asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;" ::: "memory");
      }
      cutlass::arch::NamedBarrier::sync(kThreads,
                                        cutlass::arch::ReservedNamedBarriers::EpilogueBarrier);
    }

    // Called when the subtile is staged and all threads have seen it; they meet again before the
    // buffer is reused.
    CUTLASS_DEVICE void tma_store(int epi_m, int epi_n, int, bool issues_tma) {
      if (params.direct.out == nullptr) return;
      using Store = DirectStore<Element, kSwapped, EpilogueTile, kThreads>;
      Store const store{params.direct,
                        staged,
                        tokens,
                        params.features,
                        token + (kSwapped ? epi_n : epi_m) * Store::kTokens,
                        feature + (kSwapped ? epi_m : epi_n) * Store::kFeatures,
                        thread};
      if (kSwapped || params.direct.classes == 1) {
        if (params.features < kUnit) wait_for_the_one_element(issues_tma);
        store.by_threads();
      } else {
        store.by_class(row_class, issues_tma);
      }
    }
  };

  template <bool kReferenceSrc, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      cutlass::epilogue::fusion::ConsumerStoreArgs<Args...> const& args) {
    using namespace cute;
    auto const [M, N, K, L] = args.problem_shape_mnkl;
    auto const [m, n, k, l] = args.tile_coord_mnkl;
    int const row = m * size<0>(Tile{}), column = n * size<1>(Tile{});
    constexpr int kThreads = decltype(size(args.tiled_copy))::value;
    // Each thread's share of a vector along the rows or the columns of the tile.
    auto const share = [&](float const* vector, auto stride) {
      auto const tile = make_tensor(make_smem_ptr(vector), take<0, 2>(Tile{}), stride);
      return cutlass::epilogue::fusion::sm90_partition_for_epilogue<kReferenceSrc>(
          tile, args.epi_tile, args.tiled_copy, args.thread_idx);
    };
    using Rows = Stride<_1, _0>;
    using Columns = Stride<_0, _1>;
    auto const per_token = share(shared->lhs_scale, conditional_t<kSwapped, Columns, Rows>{});
    conditional_t<kSwapped, Rows, Columns> along_features;
    auto const rhs_scale = share(shared->rhs_scale, along_features);
    auto const bias = share(shared->bias, along_features);
    return Callbacks<decltype(args.epi_tile), kThreads, remove_cvref_t<decltype(per_token)>,
                     remove_cvref_t<decltype(bias)>>(
        *params, *shared, per_token, rhs_scale, bias, kSwapped ? N : M, kSwapped ? column : row,
        (kSwapped ? row : column) - l * params->direct.step, l, args.thread_idx);
  }
};

template <class Tile, class Element, Operands kOperands>
struct Epilogue {
  using Root = Finish<Tile, Element, kOperands>;
  using Callbacks =
      cutlass::epilogue::fusion::Sm90EVT<Root, cutlass::epilogue::fusion::Sm90AccFetch>;

  static typename Callbacks::Arguments arguments(GemmProblem const& p,
                                                 DirectStoreArguments<Element> const& direct) {
    return {{},
            {p.lhs_scale, p.rhs_scale, p.bias, p.per_token, p.per_channel, p.n, p.activation,
             direct}};
  }
};

}  // namespace jaxfp8
