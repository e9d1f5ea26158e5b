// The one kernel template: a CUTLASS sm90 collective with our epilogue.
#pragma once

// The kernels can start before their predecessor on the stream ends, and wait inside for its
// results; whether a launch does is GemmProblem::dependent.
#define CUTLASS_ENABLE_GDC_FOR_SM90 1

#include "cutlass/cutlass.h"
// clang-format off
#include "cute/tensor.hpp"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
// clang-format on

#include "epilogue.cuh"
#include "gemm.h"

namespace jaxfp8 {

template <Schedule kSchedule, Accumulation kAccumulation>
struct Schedules {
  static constexpr bool kFast = kAccumulation == Accumulation::kFast;
  template <class Fast, class Promoted>
  using Pick = cute::conditional_t<kFast, Fast, Promoted>;

  // The FP8 collectives promote unless their schedule says FastAccum.
  using Mainloop = cute::conditional_t<
      kSchedule == Schedule::kPingpong,
      Pick<cutlass::gemm::KernelTmaWarpSpecializedPingpongFP8FastAccum,
           cutlass::gemm::KernelTmaWarpSpecializedPingpong>,
      cute::conditional_t<kSchedule == Schedule::kCooperative,
                          Pick<cutlass::gemm::KernelTmaWarpSpecializedCooperativeFP8FastAccum,
                               cutlass::gemm::KernelTmaWarpSpecializedCooperative>,
                          Pick<cutlass::gemm::KernelTmaWarpSpecializedFP8FastAccum,
                               cutlass::gemm::KernelTmaWarpSpecialized>>>;
  using Epilogue = cute::conditional_t<kSchedule == Schedule::kCooperative,
                                       cutlass::epilogue::TmaWarpSpecializedCooperative,
                                       cutlass::epilogue::TmaWarpSpecialized>;
};

template <Kernel kKernel, class Element>
struct Gemm {
  static constexpr KernelSpec kSpec = spec_of(kKernel);
  static constexpr bool kSwapped = kSpec.operands == Operands::kSwapped;

  // NOTES: CUTLASS promotes when its count of MMAs, which grows by a whole tile, *equals* 4. With a
  // K tile of 256 it never does, and the kernel is silently the fast one (seen: same bits).
  static_assert(kSpec.accumulation == Accumulation::kFast || kSpec.tile_k == 128,
                "promotion wants a K tile of 4 MMAs of 32");

  using Tile = cute::Shape<cute::Int<kSpec.tile_m>, cute::Int<kSpec.tile_n>,
                           cute::Int<kSpec.tile_k>>;
  using Cluster = cute::Shape<cute::Int<kSpec.cluster_m>, cute::Int<kSpec.cluster_n>, cute::_1>;
  using Picked = Schedules<kSpec.schedule, kSpec.accumulation>;
  using Fp8 = cutlass::float_e4m3_t;
  using Fused = Epilogue<Tile, Element, kSpec.operands>;

  // out is row-major [m, n]; its transpose, which the swapped kernel writes, column-major [n, m].
  using LayoutOut =
      cute::conditional_t<kSwapped, cutlass::layout::ColumnMajor, cutlass::layout::RowMajor>;
  static constexpr int kAlignFp8 = 16;
  static constexpr int kAlignOut = 16 / sizeof(Element);

  // NOTES: 64 columns at a time where CUTLASS would take 32: as fast for aligned rows, and 128 bytes
  // in a run for those that are not (direct_store.cuh). 128x128 Pingpong spills 100 bytes with it.
  using EpilogueTile = cute::conditional_t<
      kSwapped || sizeof(Element) == 4, cutlass::epilogue::collective::EpilogueTileAuto,
      cute::Shape<cute::Int<kSpec.schedule == Schedule::kCooperative ? 128 : 64>, cute::_64>>;

  using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster, EpilogueTile, float, float, void, LayoutOut, kAlignOut,
      Element, LayoutOut, kAlignOut, typename Picked::Epilogue,
      typename Fused::Callbacks>::CollectiveOp;

  using CollectiveMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Fp8, cutlass::layout::RowMajor,
      kAlignFp8, Fp8, cutlass::layout::ColumnMajor, kAlignFp8, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename CollectiveEpilogue::SharedStorage))>,
      typename Picked::Mainloop>::CollectiveOp;

  using GemmKernel =
      cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, CollectiveMainloop,
                                           CollectiveEpilogue>;
  using Device = cutlass::gemm::device::GemmUniversalAdapter<GemmKernel>;

  // NOTES: raising the shared-memory limit also loads the kernel's module, which must not happen
  // inside stream capture; so XLA's Initialize stage calls this.
  static char const* prepare() {
    cudaError_t const status = cudaFuncSetAttribute(
        reinterpret_cast<void const*>(&cutlass::device_kernel<GemmKernel>),
        cudaFuncAttributeMaxDynamicSharedMemorySize, GemmKernel::SharedStorageSize);
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
  }

  static char const* launch(GemmProblem const& p) {
    bool const direct = p.out_pitch % kAlignOut != 0;
    int64_t const tma_pitch = (p.out_pitch + kAlignOut - 1) / kAlignOut * kAlignOut;
    auto const k_major = cute::make_stride(static_cast<int64_t>(p.k), cute::_1{}, int64_t{0});

    typename GemmKernel::Arguments args{};
    args.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    args.epilogue.thread = Fused::arguments(p, direct);
    args.epilogue.ptr_D = static_cast<Element*>(p.out);
    args.hw_info.sm_count = p.sm_count;
    args.scheduler.max_swizzle_size = p.swizzle;
    args.mainloop.ptr_A = static_cast<Fp8 const*>(kSwapped ? p.rhs : p.lhs);
    args.mainloop.ptr_B = static_cast<Fp8 const*>(kSwapped ? p.lhs : p.rhs);
    args.mainloop.dA = args.mainloop.dB = k_major;
    if constexpr (kSwapped) {
      args.problem_shape = {p.n, p.m, p.k, 1};
      args.epilogue.dD = cute::make_stride(cute::_1{}, tma_pitch, int64_t{0});
    } else {
      args.problem_shape = {p.m, p.n, p.k, 1};
      args.epilogue.dD = cute::make_stride(tma_pitch, cute::_1{}, int64_t{0});
    }
    args.epilogue.dC = args.epilogue.dD;

    // NOTES: can_implement also wants n itself to be a multiple of 16 bytes. TMA needs that of the
    // pitch alone and clips the last box to n.
    if (Device::get_workspace_size(args) != 0) return "the kernel wants a workspace";
    auto params = GemmKernel::to_underlying_arguments(args, nullptr);
    if (direct) {
      // Every TMA store but that of out[0, 0], which is right, is clipped away.
      auto const one = cute::make_shape(1, 1, p.k, 1);
      params.epilogue.tma_store_d =
          CollectiveEpilogue::to_underlying_arguments(one, args.epilogue, nullptr).tma_store_d;
    }
    cutlass::Status const status = Device::run(params, p.stream, nullptr, p.dependent);
    return status == cutlass::Status::kSuccess ? nullptr : cutlass::cutlassGetStatusString(status);
  }
};

}  // namespace jaxfp8
