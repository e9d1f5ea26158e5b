// A CUTLASS mainloop that adds the tensor core's sums to float32 registers after every K tile.
#pragma once

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"

namespace jaxfp8 {

// Base's loads and a loop of our own. A warpgroup multiplies each K tile in parts: 64 of its rows
// with all columns of the tile, or with half of them, into one of two sets of sums in turn. The
// first K tile's products are the first sums.
//
// NOTES: the tensor core must have work while a warpgroup adds. CUTLASS's loop leaves that to
// chance: two warpgroups that wait for the same K tile start together, share the tensor core, end
// together and then both add. Here each has asked for the next part before it adds the sums of the
// last. Before, with one set and turns for the two warpgroups, the kernels were 0.909 times as fast
// as cuBLASLt without use_fast_accum at M >= 512; then 0.960, and 0.980 with a shorter epilogue and
// work in it (kAhead; H200, 2026-11-23 and 24). 256x4096x4096 took 14.2 us, and takes 9.5.
//
// Both sets and the tile's sums must fit the registers: half of the columns where those are many.
// An MMA may be under way where the loop begins again, if the first thing that it does then is to
// wait for all of them; with wait_group 1 there ptxas serializes all MMAs (C7514), and with sums
// read there that a wait before the loop's end has made ready it waits once more (C7517). So a
// turn's last part is added in the next turn, behind that one's first MMAs. And to set a tile's
// sums to zero (CS2R) takes time in which the tensor core has nothing to do: 8192x3424x1280 in
// tiles of 128x192 takes 67.2 us without, 68.8 with it, and 70.3 where ptxas does it twice.
// Cooperative 128x128 takes 0.94 to 0.97 of its time for both together (K >= 4096), 256x128 0.99,
// 128x192 0.98 to 1.00, swapped Pingpong 64x128 0.94 to 0.96, Pingpong 128x128 0.91 to 0.97 (H200,
// 2026-11-30, in turn, the same bits).
// Tried, of no use: two warpgroups with a tile and loads of their own each, so that one multiplies
// while the other stores (128x96, 64x128: slower at 18 of 19 shapes); 128x144, the widest tile
// whose three sets fit without halves (with 216 for kMostSums; never the best); one warpgroup of a
// Cooperative kernel a K tile or two behind the other, so that one has MMAs while the other stores
// (1.00 to 1.02); the K tile released before the next MMAs are asked for (1.00 to 1.03).
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

    auto const issue = [&](auto i, auto& set, auto... arrived) {
      constexpr int kPart = decltype(i)::value % kParts;
      if constexpr (sizeof...(arrived) > 0) {
        pipeline.consumer_wait(state, arrived...);
      } else if constexpr (kPart == 0) {
        pipeline.consumer_wait(state, pipeline.consumer_try_wait(state));
      }
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
    auto const release = [&] {
      pipeline.consumer_release(done);
      ++done;
    };
    // The sums that a part's products belong to.
    auto const sums_of = [&](auto i) {
      constexpr int kPart = decltype(i)::value % kParts;
      auto const first = sums.layout()(kPart % kColumnParts * kPartSums, kPart / kColumnParts, 0);
      return make_tensor(sums.data() + first, Part{}.layout());
    };
    // With the last part of a K tile its memory is released, unless there is none.
    auto const add = [&](auto i, auto& set, auto... is_there) {
      warpgroup_fence_operand(set);
      if constexpr (decltype(i)::value % kParts == kParts - 1) {
        if ((is_there && ...)) release();
      }
      auto to = sums_of(i);
      CUTLASS_PRAGMA_UNROLL
      for (int sum = 0; sum < kPartSums; ++sum) to(sum) += set(sum);
      warpgroup_fence_operand(sums);  // added here; moved further down they want more registers
    };

    if constexpr (kAhead) {
      if (!begun) issue(_0{}, even);
    }
    for_each(make_int_sequence<kParts>{}, [&](auto i) {
      if constexpr (!kAhead || decltype(i)::value > 0) {
        auto first = sums_of(i);
        issue(i, first);
      }
    });
    clear(odd);  // while they are under way
    warpgroup_fence_operand(odd);
    cute::warpgroup_wait<0>();
    warpgroup_fence_operand(sums);
    if constexpr (kAhead) {
      warpgroup_fence_operand(even);
      copy(even, sums_of(_0{}));
    }
    release();
    --k_tiles;

    // Whether `odd` has the last part of a K tile, done or under way and not yet added; else zeros.
    bool left = false;
    Int<kParts - 1> const last;
    auto const multiply = [&](auto tiles) {
      auto const arrived = pipeline.consumer_try_wait(state);
      cute::warpgroup_wait<0>();
      issue(_0{}, even, arrived);
      add(last, odd, left);
      for_each(make_int_sequence<decltype(tiles)::value * kParts - 1>{}, [&](auto i) {
        constexpr bool kOdd = decltype(i)::value % 2 == 1;
        issue(i + _1{}, kOdd ? even : odd);
        cute::warpgroup_wait<1>();
        add(i, kOdd ? odd : even);
      });
      left = true;
    };
    CUTLASS_PRAGMA_NO_UNROLL
    for (; k_tiles >= kTogether; k_tiles -= kTogether) multiply(Int<kTogether>{});
    if constexpr (kParts > 1) {
      CUTLASS_PRAGMA_NO_UNROLL
      for (; k_tiles > 0; --k_tiles) multiply(_1{});
    } else {
      CUTLASS_PRAGMA_NO_UNROLL
      for (; k_tiles >= 2; k_tiles -= 2) multiply(_2{});
      if (k_tiles > 0) {
        multiply(_1{});
        cute::warpgroup_wait<0>();
        add(last, even);
        return;
      }
    }
    cute::warpgroup_wait<0>();
    add(last, odd, left);
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
