// The epilogue: out = activation(lhs_scale * (rhs_scale * acc) + bias), in float32, rounded once.
#pragma once

#include "cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp"
#include "direct_store.cuh"
#include "elementwise.cuh"
#include "gemm.h"

namespace jaxfp8 {

// The root of CUTLASS's epilogue tree, over the accumulator alone: all arithmetic is here, a
// subtile at a time.
// NOTES: CUTLASS's broadcast nodes read their vectors one after another, each waiting for memory
// while the GEMM is already done. Here the three are asked for together, before the GEMM begins
// (kernel.cuh). With CUTLASS's nodes a 512x4096x256 GEMM took 5.0 us without an epilogue and 6.0
// (swapped 6.5) with it (H200, 2026-11-22).
template <class Tile, class Element, Operands kOperands, int kTeams>
struct Finish : cutlass::epilogue::fusion::Sm90VisitorImpl<> {
  static constexpr bool kSwapped = kOperands == Operands::kSwapped;
  // Swapped, the features run along the rows of the tile and the tokens along its columns.
  static constexpr int kTokens = cute::size<kSwapped ? 1 : 0>(Tile{});
  static constexpr int kFeatures = cute::size<kSwapped ? 0 : 1>(Tile{});

  struct Vectors {
    alignas(16) float lhs_scale[kTokens];
    alignas(16) float rhs_scale[kFeatures];
    alignas(16) float bias[kFeatures];
  };
  struct SharedStorage {
    Vectors of_team[kTeams];
  };

  struct Arguments {
    float const* lhs_scale = nullptr;  // [tokens] if per_token, [classes, tokens] with classes
    float const* rhs_scale = nullptr;  // [features] if per_channel
    float const* bias = nullptr;       // [bias_features], or null
    bool per_token = false, per_channel = false;
    int features = 0, bias_features = 0;
    Activation activation = Activation::kNone;
    bool float16 = false;              // of 16 bits: float16, not bfloat16
    float const* out_scale = nullptr;  // one value, for e4m3
    DirectStoreArguments<Element> direct;
  };
  using Params = Arguments;

  template <class ProblemShape>
  static constexpr Params to_underlying_arguments(ProblemShape const&, Arguments const& args,
                                                  void*) {
    return args;
  }

  CUTLASS_HOST_DEVICE Finish() {}
  CUTLASS_HOST_DEVICE Finish(Params const& params, SharedStorage const& shared)
      : params(&params), shared(const_cast<SharedStorage*>(&shared)) {}

  Params const* params = nullptr;
  SharedStorage* shared = nullptr;

  // By a warp, before they are wanted: a class's descriptor would be waited for behind CUTLASS's own.
  static CUTLASS_DEVICE void prefetch_descriptors(Params const& params) {
    int const row_class = threadIdx.x % 32;
    if (params.direct.classes > 1 && row_class < params.direct.classes) {
      cute::prefetch_tma_descriptor(&params.direct.tensor[row_class]);
    }
  }

  // Where a tile of the result, or of a class of its rows, begins, and how many tokens that has.
  struct Place {
    int tokens, token, feature, row_class;  // the feature may be negative
  };

  template <class ProblemShape, class Coordinates>
  CUTLASS_DEVICE Place place(ProblemShape const& shape, Coordinates const& coordinates) const {
    auto const [M, N, K, L] = shape;
    auto const [m, n, k, l] = coordinates;
    int const row = m * cute::size<0>(Tile{}), column = n * cute::size<1>(Tile{});
    return {kSwapped ? N : M, kSwapped ? column : row,
            (kSwapped ? row : column) - l * params->direct.step, l};
  }

  // One thread's share of a tile's vectors, on its way.
  template <int kThreads>
  struct Fetched {
    static constexpr int kTokenTurns = (kTokens + kThreads - 1) / kThreads;
    static constexpr int kFeatureTurns = (kFeatures + kThreads - 1) / kThreads;
    float lhs_scale[kTokenTurns], rhs_scale[kFeatureTurns], bias[kFeatureTurns];
  };

  template <int kThreads, class ProblemShape, class Coordinates>
  CUTLASS_DEVICE Fetched<kThreads> fetch(ProblemShape const& shape, Coordinates const& coordinates,
                                         int thread) const {
    Place const at = place(shape, coordinates);
    Fetched<kThreads> fetched;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < fetched.kFeatureTurns; ++i) {
      int const f = at.feature + thread + i * kThreads;
      bool const inside = f >= 0 && f < params->features;
      fetched.rhs_scale[i] = inside ? params->rhs_scale[params->per_channel ? f : 0] : 0.f;
      fetched.bias[i] = f >= 0 && f < params->bias_features ? params->bias[f] : 0.f;
    }
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < fetched.kTokenTurns; ++i) {
      int const t = at.token + thread + i * kThreads;
      int const place_of_t = params->per_token ? at.row_class * at.tokens + t : 0;
      fetched.lhs_scale[i] = t < at.tokens ? params->lhs_scale[place_of_t] : 0.f;
    }
    return fetched;
  }

  // Puts them where the tile's whole team reads them, once it has met (begin_sync_needed).
  template <int kThreads>
  CUTLASS_DEVICE void stage(Fetched<kThreads> const& fetched, int team, int thread) const {
    Vectors& to = shared->of_team[team];
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < fetched.kFeatureTurns; ++i) {
      int const f = thread + i * kThreads;
      if (f < kFeatures) to.rhs_scale[f] = fetched.rhs_scale[i], to.bias[f] = fetched.bias[i];
    }
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < fetched.kTokenTurns; ++i) {
      int const t = thread + i * kThreads;
      if (t < kTokens) to.lhs_scale[t] = fetched.lhs_scale[i];
    }
  }

  template <class EpilogueTile, int kThreads, class PerToken, class PerFeature>
  struct Callbacks : cutlass::epilogue::fusion::EmptyConsumerStoreCallbacks {
    CUTLASS_DEVICE Callbacks(Params const& params, PerToken lhs_scale, PerFeature rhs_scale,
                             PerFeature bias, Place at, int thread)
        : params(params), lhs_scale(lhs_scale), rhs_scale(rhs_scale), bias(bias), at(at),
          thread(thread) {}

    Params const& params;
    PerToken lhs_scale;  // this thread's share of the vectors in shared memory
    PerFeature rhs_scale, bias;
    Place at;
    int thread;
    Element* staged = nullptr;

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
      if constexpr (sizeof(Element) == 2) round_to_16_bits(z, params.float16);
      // Not __ldg: with dependent launch the kernel before may have written it after this one began.
      if constexpr (sizeof(Element) == 1) divide(z, *params.out_scale);
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
      if constexpr (sizeof(Element) > 1) {  // rows of e4m3 are padded
        if (params.direct.out != nullptr) store_directly(epi_m, epi_n, issues_tma);
      }
    }

    CUTLASS_DEVICE void store_directly(int epi_m, int epi_n, bool issues_tma) {
      using Store = DirectStore<Element, kSwapped, EpilogueTile, kThreads>;
      Store const store{params.direct,
                        staged,
                        at.tokens,
                        params.features,
                        at.token + (kSwapped ? epi_n : epi_m) * Store::kTokens,
                        at.feature + (kSwapped ? epi_m : epi_n) * Store::kFeatures,
                        thread};
      if constexpr (!kSwapped) {
        if (params.direct.classes > 1) return store.by_class(at.row_class, issues_tma);
      }
      if (params.features < Store::kUnit) wait_for_the_one_element(issues_tma);
      store.by_threads();
    }
  };

  template <bool kReferenceSrc, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      cutlass::epilogue::fusion::ConsumerStoreArgs<Args...> const& args) {
    using namespace cute;
    constexpr int kThreads = decltype(size(args.tiled_copy))::value;
    Vectors const& vectors = shared->of_team[kTeams == 1 ? 0 : threadIdx.x / kThreads - 1];
    // Each thread's share of a vector along the rows or the columns of the tile.
    auto const share = [&](float const* vector, auto stride) {
      auto const tile = make_tensor(make_smem_ptr(vector), take<0, 2>(Tile{}), stride);
      return cutlass::epilogue::fusion::sm90_partition_for_epilogue<kReferenceSrc>(
          tile, args.epi_tile, args.tiled_copy, args.thread_idx);
    };
    using Rows = Stride<_1, _0>;
    using Columns = Stride<_0, _1>;
    auto const per_token = share(vectors.lhs_scale, conditional_t<kSwapped, Columns, Rows>{});
    conditional_t<kSwapped, Rows, Columns> along_features;
    auto const rhs_scale = share(vectors.rhs_scale, along_features);
    auto const bias = share(vectors.bias, along_features);
    return Callbacks<decltype(args.epi_tile), kThreads, remove_cvref_t<decltype(per_token)>,
                     remove_cvref_t<decltype(bias)>>(
        *params, per_token, rhs_scale, bias,
        place(args.problem_shape_mnkl, args.tile_coord_mnkl), args.thread_idx);
  }
};

template <class Tile, class Element, Operands kOperands, int kTeams>
struct Epilogue {
  using Root = Finish<Tile, Element, kOperands, kTeams>;
  using Callbacks =
      cutlass::epilogue::fusion::Sm90EVT<Root, cutlass::epilogue::fusion::Sm90AccFetch>;

  static typename Callbacks::Arguments arguments(GemmProblem const& p,
                                                 DirectStoreArguments<Element> const& direct) {
    return {{},
            {p.lhs_scale, p.rhs_scale, p.bias, p.per_token, p.per_channel, p.n,
             p.bias != nullptr ? p.bias_features : 0, p.activation, p.out_type == Out::kF16,
             p.out_scale, direct}};
  }
};

}  // namespace jaxfp8
