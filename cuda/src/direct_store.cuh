// An epilogue node that stores the tile from registers, for results whose rows TMA cannot address.
#pragma once

#include "cute/tensor.hpp"
#include "cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp"

namespace jaxfp8 {

// NOTES: TMA wants rows that start at multiples of 16 bytes; a bfloat16 row of 3420 features does
// not. Padding the rows and slicing them afterwards is one more kernel and one more pass over the
// result (measured on an H200, block 1280-3420-1280: 6 to 15 % of the block, by M). This node
// passes its input on, and if it has a pointer writes it there too; the TMA store behind it is
// then given a tensor of one element (gemm.cuh). One kernel serves both, told apart at run time.
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

  template <class OutTensor, class CoordTensor, class Residue>
  struct Callbacks : cutlass::epilogue::fusion::EmptyConsumerStoreCallbacks {
    CUTLASS_DEVICE Callbacks(OutTensor out, CoordTensor coords, Residue residue, bool enabled,
                             bool pairs)
        : out(out), coords(coords), residue(residue), enabled(enabled), pairs(pairs) {}

    OutTensor out;       // (CPY,CPY_M,CPY_N,EPI_M,EPI_N)
    CoordTensor coords;  // likewise
    Residue residue;
    bool enabled, pairs;

    template <class Accumulator, int kSize>
    CUTLASS_DEVICE cutlass::Array<Element, kSize> visit(
        cutlass::Array<Accumulator, kSize> const&, int epi_v, int epi_m, int epi_n,
        cutlass::Array<Element, kSize> const& values) {
      if (enabled) {
        auto to = out(cute::_, cute::_, cute::_, epi_m, epi_n);
        auto at = coords(cute::_, cute::_, cute::_, epi_m, epi_n);
        // A thread's accumulators come in pairs of neighbouring columns (PTX ISA, wgmma
        // fragments), which are neighbours in memory where columns are features.
        if (!kTransposed && pairs) {
          CUTLASS_PRAGMA_UNROLL
          for (int i = 0; i < kSize; i += 2) {
            int const j = epi_v * kSize + i;
            if (cute::elem_less(at(j), residue)) {
              cutlass::AlignedArray<Element, 2> pair;
              pair[0] = values[i];
              pair[1] = values[i + 1];
              *reinterpret_cast<cutlass::AlignedArray<Element, 2>*>(&to(j)) = pair;
            }
          }
        } else {
          CUTLASS_PRAGMA_UNROLL
          for (int i = 0; i < kSize; ++i) {
            int const j = epi_v * kSize + i;
            if (cute::elem_less(at(j), residue)) to(j) = values[i];
          }
        }
      }
      return values;
    }
  };

  template <bool kReferenceSrc, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      cutlass::epilogue::fusion::ConsumerStoreArgs<Args...> const& args) {
    auto const [M, N, K, L] = args.problem_shape_mnkl;
    auto const stride = [&] {
      if constexpr (kTransposed) {
        return cute::make_stride(cute::_1{}, params.pitch, cute::_0{});
      } else {
        return cute::make_stride(params.pitch, cute::_1{}, cute::_0{});
      }
    }();
    auto whole = cute::make_tensor(cute::make_gmem_ptr(params.out),
                                   cute::make_layout(cute::make_shape(M, N, L), stride));
    auto mine = cutlass::epilogue::fusion::sm90_partition_for_epilogue<kReferenceSrc>(
        whole, args.tile_shape_mnk, args.tile_coord_mnkl, args.epi_tile, args.tiled_copy,
        args.thread_idx);
    return Callbacks<decltype(mine), decltype(args.tCcD), decltype(args.residue_tCcD)>(
        mine, args.tCcD, args.residue_tCcD, params.out != nullptr, params.pitch % 2 == 0);
  }
};

}  // namespace jaxfp8
