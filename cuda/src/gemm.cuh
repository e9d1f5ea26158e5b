// The one kernel template: a CUTLASS sm90 mainloop with our epilogue.
#pragma once

// The kernels can start before their predecessor on the stream ends, and wait inside for its
// results; whether a launch does is GemmProblem::dependent.
#define CUTLASS_ENABLE_GDC_FOR_SM90 1

#include <algorithm>

#include "cutlass/cutlass.h"
// clang-format off
#include "cute/tensor.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/device_kernel.h"
// clang-format on

#include "class_mainloop.cuh"
#include "epilogue.cuh"
#include "gemm.h"
#include "kernel.cuh"
#include "promoted_mainloop.cuh"

namespace jaxfp8 {

template <Kernel kKernel, class Element, bool kResidual = false>
struct Gemm {
  static constexpr KernelSpec kSpec = spec_of(kKernel);
  static constexpr bool kSwapped = kSpec.operands == Operands::kSwapped;
  static constexpr bool kPingpong = kSpec.schedule == Schedule::kPingpong;
  static constexpr bool kCooperative = kSpec.schedule == Schedule::kCooperative;
  static constexpr bool kPromoted = kSpec.accumulation == Accumulation::kPromoted;
  // Of a thread; with promotion at least so many, as two further sets are of 32 columns or more.
  static constexpr int kAccumulators = kSpec.tile_m * kSpec.tile_n / (kCooperative ? 256 : 128) +
                                       (kPromoted ? std::min(kSpec.tile_n, 64) : 0);
  static_assert(!kPromoted || kSpec.tile_k == 128, "promoted every 4 MMAs of 32: every K tile");

  using Tile = cute::Shape<cute::Int<kSpec.tile_m>, cute::Int<kSpec.tile_n>,
                           cute::Int<kSpec.tile_k>>;
  using Cluster = cute::Shape<cute::Int<kSpec.cluster_m>, cute::Int<kSpec.cluster_n>, cute::_1>;
  using Fp8 = cutlass::float_e4m3_t;
  // "FastAccum" for both accumulations: the loop that promotes is ours.
  using Loads = cute::conditional_t<kCooperative,
                                    cutlass::gemm::KernelTmaWarpSpecializedCooperativeFP8FastAccum,
                                    cutlass::gemm::KernelTmaWarpSpecializedPingpongFP8FastAccum>;
  using Finish = Epilogue<Tile, Element, kSpec.operands, kSpec.schedule, kResidual>;

  static constexpr int kAlignFp8 = 16;

  // NOTES: without what is lost to alignment: GemmKernel asserts that all fits.
  static constexpr int kBarrierBytes = 64;
  using BuiltMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Fp8, cutlass::layout::RowMajor,
      kAlignFp8, Fp8, cutlass::layout::ColumnMajor, kAlignFp8, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename Finish::Storage) + kBarrierBytes)>,
      Loads>::CollectiveOp;
  using CollectiveMainloop = ClassMainloop<cute::conditional_t<
      kPromoted, PromotedMainloop<BuiltMainloop>, BuiltMainloop>>;
  static constexpr bool kAhead = [] {
    if constexpr (kPromoted) return CollectiveMainloop::kAhead;
    return false;
  }();

  using Launched =
      GemmKernel<kSpec.schedule, CollectiveMainloop, Finish, Tile, Cluster, kAccumulators, kAhead>;

  // NOTES: raising the shared-memory limit also loads the kernel's module.
  static char const* prepare() {
    cudaError_t const status = cudaFuncSetAttribute(
        reinterpret_cast<void const*>(&cutlass::device_kernel<Launched>),
        cudaFuncAttributeMaxDynamicSharedMemorySize, Launched::SharedStorageSize);
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
  }

  // `shape`, with the rows of x rounded up to whole tiles if the memory behind them may be read.
  //
  // NOTES: rows that TMA fills with zeros, as it does outside of a matrix, cost more than rows that
  // it reads, the more blocks do it at once: N=4096, K=14336, swapped 64x128 at M=200 42.7 us and
  // 26.1, 64x64 1x2 at M=33 30.9 and 17.8 (H200, 2026-11-22, in turn).
  template <class Shape>
  static Shape with_readable_rows(GemmProblem const& p, int rows, Shape shape) {
    constexpr int kRows =
        kSwapped ? kSpec.tile_n * kSpec.cluster_n : kSpec.tile_m * kSpec.cluster_m;
    int const whole = (rows + kRows - 1) / kRows * kRows;
    if ((p.classes.count - 1) * rows + whole <= p.lhs_rows) {
      cute::get<kSwapped ? 1 : 0>(shape) = whole;
    }
    return shape;
  }

  // Where the results go; null, or why TMA has no descriptor for them.
  static char const* describe(GemmProblem const& p, Destination<Element>* to) {
    using Staged = typename Finish::Staged;
    constexpr int kAlign = 16 / sizeof(Element);
    auto* const out = static_cast<Element*>(p.out);
    to->out = out;
    to->pitch = p.out_pitch;
    to->rows = p.m, to->tokens = p.classes.rows(p.m), to->features = p.n;
    to->classes = p.classes.count, to->step = p.classes.step;
    to->by_tma = to->classes > 1 || p.out_pitch % kAlign == 0;
    if (!to->by_tma) return nullptr;
    if (to->classes == 1) {
      return Staged::describe(&to->tensor[0], out, p.out_pitch, p.m, p.n);
    }
    for (int r = 0; r < to->classes; ++r) {
      int const row_class = r * p.classes.factor % to->classes;
      // Of row r, the features before its first multiple of a unit, and from there on whole 16
      // bytes.
      int const unit = p.classes.unit(), before = (unit - row_class * to->step) % unit;
      int const whole = (p.n - before) / kAlign * kAlign;
      int const rows = (p.m - r + to->classes - 1) / to->classes;
      to->first_row[row_class] = r;
      char const* const why =
          Staged::describe(&to->tensor[row_class], out + r * p.out_pitch + before,
                           p.out_pitch * to->classes, rows, whole);
      if (why != nullptr) return why;
    }
    return nullptr;
  }

  static char const* launch(GemmProblem const& p) {
    typename Finish::Params finish;
    finish.lhs_scale = p.lhs_scale, finish.rhs_scale = p.rhs_scale, finish.bias = p.bias;
    finish.per_token = p.per_token, finish.per_channel = p.per_channel;
    finish.bias_features = p.bias != nullptr ? p.bias_features : 0;
    finish.activation = p.activation;
    finish.float16 = p.out_type == Out::kF16;
    finish.out_scale = p.out_scale;
    if (char const* why = describe(p, &finish.to)) return why;
    if constexpr (kResidual) {
      auto const* const residual = static_cast<Element const*>(p.residual);
      char const* const why =
          Finish::Staged::describe(&finish.residual, residual, p.out_pitch, p.m, p.n);
      if (why != nullptr) return why;
    }

    typename CollectiveMainloop::Arguments loads{};
    loads.ptr_A = static_cast<Fp8 const*>(kSwapped ? p.rhs : p.lhs);
    loads.ptr_B = static_cast<Fp8 const*>(kSwapped ? p.lhs : p.rhs);
    loads.dA = loads.dB = cute::make_stride(static_cast<int64_t>(p.k), cute::_1{}, int64_t{0});
    int const rows = finish.to.tokens;
    auto shape = cute::make_shape(p.n, p.m, p.k, 1);
    if constexpr (!kSwapped) {
      // The tiles of the last class begin all but one step early, and have as much further to go.
      int const further = p.classes.count > 1 ? p.classes.unit() - p.classes.step : 0;
      shape = cute::make_shape(rows, p.n + further, p.k, p.classes.count);
      loads.dA = cute::make_stride(int64_t{p.k}, cute::_1{}, int64_t{p.k} * rows);
    }
    auto const readable = with_readable_rows(p, rows, shape);
    typename Launched::Params params{
        CollectiveMainloop::to_underlying_arguments(readable, loads, nullptr), finish, shape,
        TileOrder(cute::get<0>(shape), cute::get<1>(shape), p.k, p.classes.count, kSpec.tile_m,
                  kSpec.tile_n, kSpec.cluster_m, kSpec.cluster_n),
        {}};
    params.prefetch = Prefetch(p, Launched::blocks(params, p.sm_count));
    if (p.classes.count > 1) {
      auto const whole = cute::make_shape(p.m, p.n, p.k, 1);
      params.mainloop.tma_load_b =
          CollectiveMainloop::to_underlying_arguments(whole, loads, nullptr).tma_load_b;
      params.mainloop.step = p.classes.step;
    }
    return Launched::launch(params, p.sm_count, p.dependent, p.stream);
  }
};

}  // namespace jaxfp8
