// A CUTLASS mainloop that adds the tensor core's sums to float32 registers after every K tile.
#pragma once

#include "cute/tensor.hpp"
#include "cutlass/arch/barrier.h"
#include "cutlass/cutlass.h"

namespace jaxfp8 {

// Base's loads and a loop of our own. With kTurns two warpgroups share each tile.
//
// NOTES: the tensor core must have work while a warpgroup adds. CUTLASS's loop leaves that to
// chance: two warpgroups that wait for the same K tile start together, share the tensor core, end
// together and then both add. Here one's MMAs are issued behind the other's, and it adds while
// those run. The sums of 64 rows at a time are enough for that, so that 256x128 tiles do not spill.
// Both together: 0.83 to 0.90 of cuBLASLt without use_fast_accum, M >= 512 (H200, 2026-11-22).
// Tried: the turn given one MMA earlier (the same) or behind all (0.5 % slower, in another run);
// two sets of sums for each warpgroup (ptxas serializes the MMAs, C7514).
template <class Base, bool kTurns>
struct PromotedMainloop : Base {
  template <class Accumulators>
  CUTLASS_DEVICE void mma(typename Base::MainloopPipeline pipeline,
                          typename Base::PipelineState state, Accumulators& sums, int k_tiles,
                          int thread, typename Base::TensorStorage& shared,
                          typename Base::Params const&) {
    using namespace cute;
    auto const a = make_tensor(make_smem_ptr(shared.smem_A.data()), typename Base::SmemLayoutA{});
    auto const b = make_tensor(make_smem_ptr(shared.smem_B.data()), typename Base::SmemLayoutB{});
    typename Base::TiledMma tiled_mma;
    int const group = __shfl_sync(0xffffffff, thread / 128, 0);
    auto const mine = tiled_mma.get_slice(group * 128);
    auto const frag_a = mine.make_fragment_A(mine.partition_A(a));  // (MMA, MMA_M, MMA_K, stage)
    auto const frag_b = mine.make_fragment_B(mine.partition_B(b));  // (MMA, MMA_N, MMA_K, stage)
    constexpr int kRows64 = decltype(size<1>(frag_a))::value;
    constexpr int kSteps = decltype(size<2>(frag_a))::value;
    static_assert(decltype(size<1>(frag_b))::value == 1, "one MMA spans the tile's columns");
    auto partial = make_fragment_like(sums(_, 0, 0));
    clear(sums);
    if (group == 1) give_turn(1);
    CUTLASS_PRAGMA_NO_UNROLL
    for (; k_tiles > 0; --k_tiles) {
      pipeline.consumer_wait(state, pipeline.consumer_try_wait(state));
      CUTLASS_PRAGMA_UNROLL
      for (int row = 0; row < kRows64; ++row) {
        wait_for_turn(group);
        warpgroup_fence_operand(partial);
        cute::warpgroup_arrive();
        tiled_mma.accumulate_ = GMMA::ScaleOut::Zero;
        CUTLASS_PRAGMA_UNROLL
        for (int k = 0; k < kSteps; ++k) {
          cute::gemm(tiled_mma, frag_a(_, row, k, state.index()), frag_b(_, 0, k, state.index()),
                     partial);
          tiled_mma.accumulate_ = GMMA::ScaleOut::One;
          // One MMA early, so that the other's first is there when the last of these ends.
          if (k == kSteps - 2 && (group == 0 || k_tiles > 1 || row < kRows64 - 1)) {
            give_turn(group);
          }
        }
        cute::warpgroup_commit_batch();
        cute::warpgroup_wait<0>();
        warpgroup_fence_operand(partial);
        if (row == kRows64 - 1) pipeline.consumer_release(state);
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < size(partial); ++i) sums(i, row, 0) += partial(i);
      }
      ++state;
    }
  }

  // All of them are done, and their memory released.
  CUTLASS_DEVICE void mma_tail(typename Base::MainloopPipeline, typename Base::PipelineState,
                               int) {}

 private:
  // Named barriers 0 and 1 of the user's, which only Pingpong kernels have in use (kernel.cuh).
  static CUTLASS_DEVICE void wait_for_turn(int group) {
    if constexpr (kTurns) cutlass::arch::NamedBarrier::sync(2 * 128, group);
  }
  static CUTLASS_DEVICE void give_turn(int group) {
    if constexpr (kTurns) cutlass::arch::NamedBarrier::arrive(2 * 128, 1 - group);
  }
};

}  // namespace jaxfp8
