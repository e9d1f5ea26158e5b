// An epilogue node that stores the tile with plain stores, for results whose rows TMA cannot
// address.
#pragma once

#include "cute/tensor.hpp"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp"

namespace jaxfp8 {

// NOTES: TMA wants rows that start at multiples of 16 bytes; a bfloat16 row of 3420 features does
// not. Padding the rows and slicing them afterwards is one more kernel and one more pass over the
// result. This node passes its input on; if it has a pointer, all threads also copy each subtile
// that the epilogue has staged in shared memory for TMA to where it belongs, and the TMA store
// gets a tensor of one element (gemm.cuh). One kernel serves both, told apart at run time.
// What it costs is partly written sectors: L2 takes 32 bytes at a time, and a row that starts at 8
// modulo 32 splits one at each end of each run (ncu, 4096x3420x1280: 3.2 million sector writes for
// 1.3 million aligned; issue slots and DRAM traffic alike). So the runs are long. Block
// 1280-3420-1280 over 1280-3424-1280 at M = 4096 on an H200, 2026-11-22: sliced by XLA 1.145,
// stored from the accumulators in runs of 16 bytes 1.137, staged in runs of 64 bytes 1.135, of 128
// bytes (EpilogueTile in gemm.cuh) 1.080.
template <class Element, bool kTransposed>
struct DirectStore : cutlass::epilogue::fusion::Sm90VisitorImpl<> {
  struct SharedStorage {};

  struct Arguments {
    Element* out = nullptr;
    int64_t pitch = 0;
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

  CUTLASS_HOST_DEVICE DirectStore() {}
  CUTLASS_HOST_DEVICE DirectStore(Params const& params, SharedStorage const&) : params(params) {}

  Params params;

  template <class EpilogueTile, int kThreads>
  struct Callbacks : cutlass::epilogue::fusion::EmptyConsumerStoreCallbacks {
    CUTLASS_DEVICE Callbacks(Params const& params, int tokens, int features, int token,
                             int feature, int thread)
        : params(params),
          tokens(tokens),
          features(features),
          token(token),
          feature(feature),
          thread(thread) {}

    static constexpr int kRows = cute::size<0>(EpilogueTile{});
    static constexpr int kColumns = cute::size<1>(EpilogueTile{});
    static constexpr int kTokens = kTransposed ? kColumns : kRows;
    static constexpr int kFeatures = kTransposed ? kRows : kColumns;

    Params const& params;
    int tokens, features;  // of the whole result
    int token, feature;    // where this tile of it begins
    int thread;
    Element* staged = nullptr;

    template <class Accumulator, class Value, int kSize>
    CUTLASS_DEVICE cutlass::Array<Value, kSize> visit(cutlass::Array<Accumulator, kSize> const&,
                                                      int, int, int,
                                                      cutlass::Array<Value, kSize> const& values) {
      return values;
    }

    // Called before a subtile is staged, with the buffer that it will be in.
    template <class Buffer, class Sync, class Values>
    CUTLASS_DEVICE void reduce(Buffer&& buffer, Sync const&, int, int, bool, Values const&) {
      staged = cute::raw_pointer_cast(buffer.data());
    }

    // Called when the subtile is staged and all threads have seen it; they meet again before the
    // buffer is reused.
    CUTLASS_DEVICE void tma_store(int epi_m, int epi_n, int, bool) {
      if (params.out == nullptr) return;
      int const first_token = token + (kTransposed ? epi_n : epi_m) * kTokens;
      int const first_feature = feature + (kTransposed ? epi_m : epi_n) * kFeatures;
      if (params.pitch * sizeof(Element) % 8 == 0) {
        copy<8 / sizeof(Element)>(first_token, first_feature);
      } else {
        copy<1>(first_token, first_feature);
      }
    }

    // kPiece neighbouring features at a time; the pitch is a multiple of them, and so are all
    // coordinates.
    template <int kPiece>
    CUTLASS_DEVICE void copy(int first_token, int first_feature) {
      using Piece = cutlass::AlignedArray<Element, kPiece>;
      constexpr int kPieces = kFeatures / kPiece;
      constexpr int kStep = kThreads / kPieces;  // tokens from one turn to the next
      constexpr int kTurns = kTokens / kStep;
      static_assert(kThreads % kPieces == 0 && kTokens % kStep == 0, "pieces left over");
      auto const tile = staged_tile();
      int const f = thread % kPieces * kPiece, t = thread / kPieces;
      Piece const* from = piece_at<Piece>(tile, t, f);
      Element* to = params.out + (first_token + t) * params.pitch + first_feature + f;
      int const rows = first_feature + f < features ? tokens - first_token - t : 0;
      // NOTES: the swizzle repeats after 8 tokens, so where a turn is a multiple of that its source
      // is at a constant distance, and a turn is a load, a comparison and a store. The epilogue of
      // a short K is as long as its mainloop: whatever is added here shows.
      constexpr bool kRegular = kStep % 8 == 0 && kTurns % 2 == 0;
      CUTLASS_PRAGMA_UNROLL
      for (int turn = 0; turn < kTurns; turn += kRegular ? 2 : 1) {
        if constexpr (kRegular) {
          int const distance = static_cast<int>(piece_at<Piece>(tile, kStep, 0) -
                                                piece_at<Piece>(tile, 0, 0));
          Piece const first = from[turn * distance], second = from[(turn + 1) * distance];
          if (turn * kStep < rows) store(to + turn * kStep * params.pitch, first);
          if ((turn + 1) * kStep < rows) store(to + (turn + 1) * kStep * params.pitch, second);
        } else {
          if (turn * kStep < rows) {
            store(to + turn * kStep * params.pitch, *piece_at<Piece>(tile, t + turn * kStep, f));
          }
        }
      }
    }

    template <class Piece>
    CUTLASS_DEVICE static void store(Element* to, Piece const& piece) {
      *reinterpret_cast<Piece*>(to) = piece;
    }

    template <class Piece, class Tile>
    CUTLASS_DEVICE static Piece const* piece_at(Tile const& tile, int token, int feature) {
      return reinterpret_cast<Piece const*>(&(kTransposed ? tile(feature, token)
                                                          : tile(token, feature)));
    }

    // The staged subtile in CUTLASS's layout.
    CUTLASS_DEVICE auto staged_tile() const {
      using Stride = cute::conditional_t<kTransposed, cute::Stride<cute::_1, int64_t, cute::_0>,
                                         cute::Stride<int64_t, cute::_1, cute::_0>>;
      using Atom = decltype(cutlass::epilogue::collective::detail::
                                sm90_get_epilogue_smem_swizzle_layout_atom<Stride, Element,
                                                                           EpilogueTile>());
      using Order = cute::conditional_t<kTransposed, cute::Step<cute::_2, cute::_1>,
                                        cute::Step<cute::_1, cute::_2>>;
      using Shape = cute::Shape<cute::Int<kRows>, cute::Int<kColumns>>;
      return cute::as_position_independent_swizzle_tensor(cute::make_tensor(
          cute::make_smem_ptr(staged), cute::tile_to_shape(Atom{}, Shape{}, Order{})));
    }
  };

  template <bool kReferenceSrc, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      cutlass::epilogue::fusion::ConsumerStoreArgs<Args...> const& args) {
    auto const [M, N, K, L] = args.problem_shape_mnkl;
    auto const [m, n, k, l] = args.tile_coord_mnkl;
    int const row = m * cute::size<0>(args.tile_shape_mnk);
    int const column = n * cute::size<1>(args.tile_shape_mnk);
    constexpr int kThreads = decltype(cute::size(args.tiled_copy))::value;
    using Mine = Callbacks<decltype(args.epi_tile), kThreads>;
    return kTransposed ? Mine(params, N, M, column, row, args.thread_idx)
                       : Mine(params, M, N, row, column, args.thread_idx);
  }
};

}  // namespace jaxfp8
