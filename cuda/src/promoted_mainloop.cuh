// A CUTLASS mainloop that adds the tensor core's sums to float32 registers after every K tile.
#pragma once

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"

namespace jaxfp8 {

// Base's loads and a loop of our own. A warpgroup multiplies each K tile in parts: 64 of its rows
// with all columns of the tile, or with half of them, into one of two sets of sums in turn.
//
// NOTES: the tensor core must have work while a warpgroup adds. CUTLASS's loop leaves that to
// chance: two warpgroups that wait for the same K tile start together, share the tensor core, end
// together and then both add. Here each has asked for the next part before it adds the sums of the
// last. Before, with one set and turns for the two warpgroups, the kernels were 0.909 times as fast
// as cuBLASLt without use_fast_accum at M >= 512; then 0.960, and 0.980 with a shorter epilogue and
// work in it (kAhead; H200, 2026-11-23 and 24). 256x4096x4096 took 14.2 us, and takes 9.5.
//
// Both sets and the tile's sums must fit the registers: half of the columns where those are many.
// And ptxas serializes the MMAs (C7514) if one is under way where the loop begins again: so it has
// several K tiles in a row and then waits, which leaves the tensor core to the other warpgroup of a
// Cooperative kernel, and idle in a Pingpong one.
// Tried, of no use: two warpgroups with a tile and loads of their own each, so that one multiplies
// while the other stores (128x96, 64x128: slower at 18 of 19 shapes); 128x144, the widest tile
// whose three sets fit without halves (with 216 for kMostSums; never the best).
template <class Base>
struct PromotedMainloop : Base {
  static constexpr int kGroups = cute::size(typename Base::TiledMma{}) / 128;
  static constexpr int kTileM = cute::size<0>(typename Base::TileShape{});
  static constexpr int kTileN = cute::size<1>(typename Base::TileShape{});
  static constexpr int kTileSums = kTileM * kTileN / (128 * kGroups);  // of a thread
  static constexpr int kMostSums = 200;                                // with those of two parts
  static constexpr int kColumns = kTileSums + kTileN <= kMostSums ? kTileN : kTileN / 2;
  static constexpr int kPartSums = kColumns / 2;  // of a thread
  static constexpr int kColumnParts = kTileN / kColumns;
  static constexpr int kParts = kTileM / (64 * kGroups) * kColumnParts;  // of a K tile
  static constexpr int kTogether = kParts > 2 ? 2 : 4;                   // K tiles

  // Whether a tile's first part is asked for before the tile before it is stored, so that the
  // tensor core has work meanwhile: 256x128 takes 0.97 to 1.00 of its time. Where a part is a whole
  // K tile it is of no use: 128x128 takes 9 % longer at 1024x1280x3424; nor where it is half of
  // one: 128x160 and 128x192 take 0.97 to 1.04 of their time (H200, 2026-11-24).
  static constexpr bool kAhead = kGroups == 2 && kParts > 2;

  using Rows = cute::Int<64 * kGroups>;
  using PartMma = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<
          typename Base::ElementA, typename Base::ElementB, float,
          cute::Shape<cute::_64, cute::Int<kColumns>, cute::_128>, cute::GMMA::Major::K,
          cute::GMMA::Major::K>(),
      cute::Layout<cute::Shape<cute::Int<kGroups>, cute::_1, cute::_1>>{}));

  // A thread's sums of a part.
  using Part = decltype(cute::make_tensor<float>(cute::make_shape(cute::get<0>(
      cute::partition_shape_C(PartMma{}, cute::Shape<Rows, cute::Int<kColumns>>{})))));

  // `even` has this tile's first part, if it has `begun`, and gets that of the next, if there is a
  // `next`: under way until it has settled.
  template <class Accumulators>
  CUTLASS_DEVICE void mma(typename Base::MainloopPipeline pipeline,
                          typename Base::PipelineState state, Accumulators& sums, int k_tiles,
                          int thread, typename Base::TensorStorage& shared, Part& even, bool begun,
                          bool next) {
    using namespace cute;
    auto const a = make_tensor(make_smem_ptr(shared.smem_A.data()), typename Base::SmemLayoutA{});
    auto const b = make_tensor(make_smem_ptr(shared.smem_B.data()), typename Base::SmemLayoutB{});
    PartMma part_mma;
    int const group = __shfl_sync(0xffffffff, thread / 128, 0);
    auto const mine = part_mma.get_slice(group * 128);
    auto const frag_a = mine.make_fragment_A(mine.partition_A(a));  // (MMA, rows, MMA_K, stage)
    auto const frag_b = mine.make_fragment_B(mine.partition_B(b));  // (MMA, columns, MMA_K, stage)
    Part odd;
    static_assert(decltype(size(odd))::value == kPartSums, "one MMA spans a part's columns");
    auto done = state;
    clear(sums);

    auto const issue = [&](auto i, auto& set) {
      constexpr int kPart = decltype(i)::value % kParts;
      if constexpr (kPart == 0) pipeline.consumer_wait(state, pipeline.consumer_try_wait(state));
      warpgroup_fence_operand(set);
      cute::warpgroup_arrive();
      part_mma.accumulate_ = GMMA::ScaleOut::Zero;
      CUTLASS_PRAGMA_UNROLL
      for (int k = 0; k < size<2>(frag_a); ++k) {
        cute::gemm(part_mma, frag_a(_, kPart / kColumnParts, k, state.index()),
                   frag_b(_, kPart % kColumnParts, k, state.index()), set);
        part_mma.accumulate_ = GMMA::ScaleOut::One;
      }
      cute::warpgroup_commit_batch();
      if constexpr (kPart == kParts - 1) ++state;
    };
    auto const add = [&](auto i, auto& set) {
      constexpr int kPart = decltype(i)::value % kParts;
      warpgroup_fence_operand(set);
      if constexpr (kPart == kParts - 1) {
        pipeline.consumer_release(done);
        ++done;
      }
      CUTLASS_PRAGMA_UNROLL
      for (int sum = 0; sum < kPartSums; ++sum) {
        sums(kPart % kColumnParts * kPartSums + sum, kPart / kColumnParts, 0) += set(sum);
      }
      warpgroup_fence_operand(sums);  // added here; moved further down they want more registers
    };
    auto const multiply = [&](auto tiles) {
      constexpr int kCount = decltype(tiles)::value * kParts;
      for_each(make_int_sequence<kCount>{}, [&](auto i) {
        if (decltype(i)::value == 0 && begun) {
          begun = false;  // the part has not ended a K tile: kParts > 1
        } else {
          issue(i, decltype(i)::value % 2 == 0 ? even : odd);
        }
        if constexpr (decltype(i)::value > 0) {
          cute::warpgroup_wait<1>();
          add(i - _1{}, decltype(i)::value % 2 == 0 ? odd : even);
        }
      });
      cute::warpgroup_wait<0>();
      add(Int<kCount - 1>{}, kCount % 2 == 0 ? odd : even);
    };
    CUTLASS_PRAGMA_NO_UNROLL
    for (; k_tiles >= kTogether; k_tiles -= kTogether) multiply(Int<kTogether>{});
    if constexpr (kParts == 1) {
      if (k_tiles >= 2) {
        multiply(_2{});
        k_tiles -= 2;
      }
    }
    CUTLASS_PRAGMA_NO_UNROLL
    for (; k_tiles > 0; --k_tiles) multiply(_1{});
    if (next) issue(_0{}, even);
  }

  template <class Accumulators>
  CUTLASS_DEVICE void mma(typename Base::MainloopPipeline pipeline,
                          typename Base::PipelineState state, Accumulators& sums, int k_tiles,
                          int thread, typename Base::TensorStorage& shared,
                          typename Base::Params const&) {
    Part even;
    mma(pipeline, state, sums, k_tiles, thread, shared, even, false, false);
  }

  static CUTLASS_DEVICE void settle(Part& part) {
    cute::warpgroup_wait<0>();
    cute::warpgroup_fence_operand(part);
  }

  // All of them are done, and their memory released.
  CUTLASS_DEVICE void mma_tail(typename Base::MainloopPipeline, typename Base::PipelineState,
                               int) {}
};

}  // namespace jaxfp8
