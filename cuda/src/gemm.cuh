// The one kernel template: a CUTLASS sm90 collective with our epilogue.
#pragma once

// The kernels can start before their predecessor on the stream ends, and wait inside for its
// results; whether a launch does is GemmProblem::dependent.
#define CUTLASS_ENABLE_GDC_FOR_SM90 1

#include <algorithm>
#include <numeric>

#include "cutlass/cutlass.h"
// clang-format off
#include "cute/tensor.hpp"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/device_kernel.h"
// clang-format on

#include "class_mainloop.cuh"
#include "epilogue.cuh"
#include "gemm.h"
#include "kernel.cuh"
#include "promoted_mainloop.cuh"

namespace jaxfp8 {

template <Schedule kSchedule>
struct Schedules {
  // "FastAccum" for both accumulations: the loop that promotes is ours.
  using Mainloop = cute::conditional_t<
      kSchedule == Schedule::kPingpong, cutlass::gemm::KernelTmaWarpSpecializedPingpongFP8FastAccum,
      cutlass::gemm::KernelTmaWarpSpecializedCooperativeFP8FastAccum>;
  using Epilogue = cute::conditional_t<kSchedule == Schedule::kCooperative,
                                       cutlass::epilogue::TmaWarpSpecializedCooperative,
                                       cutlass::epilogue::TmaWarpSpecialized>;
};

template <Kernel kKernel, class Element>
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
  using Picked = Schedules<kSpec.schedule>;
  using Fp8 = cutlass::float_e4m3_t;
  using Fused = Epilogue<Tile, Element, kSpec.operands, kPingpong ? 2 : 1>;

  // out is row-major [m, n]; its transpose, which the swapped kernel writes, column-major [n, m].
  using LayoutOut =
      cute::conditional_t<kSwapped, cutlass::layout::ColumnMajor, cutlass::layout::RowMajor>;
  static constexpr int kAlignFp8 = 16;
  static constexpr int kAlignOut = 16 / sizeof(Element);

  // How many columns are staged at once.
  //
  // NOTES: each subtile costs two meetings of its threads and a fence: with 128 columns where
  // CUTLASS would take 32, 128x256 took 114.7 us at 4096^3, not 116.2 (H200, 2026-11-22); with 80
  // and not 16, Cooperative 128x80 takes 10.5 us at 1024x1280x3424, not 11.1, and 12.1 at
  // 1024x3424x1280, not 13.4; 128x160 0.97 of its time with two subtiles, not five. But where a
  // multiprocessor has many tiles, one subtile is not enough: there is one buffer then, and the
  // next tile begins when TMA has read it. 128x128 takes 0.97 of its time with two (H200,
  // 2026-11-24). 128x80 has one, as CUTLASS wants multiples of 16 columns.
  static constexpr int kMost = std::min(kSpec.tile_n, 128);
  static constexpr int kColumns = !kCooperative ? std::gcd(kSpec.tile_n, 128)
                                  : kSpec.tile_m > 128 || kMost <= 80 ? kMost : kSpec.tile_n / 2;
  using EpilogueTile = cute::conditional_t<
      sizeof(Element) != 2, cutlass::epilogue::collective::EpilogueTileAuto,
      cute::Shape<cute::Int<kCooperative ? 128 : 64>, cute::Int<kColumns>>>;

  using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster, EpilogueTile, float,
      float, void, LayoutOut, kAlignOut, Element, LayoutOut, kAlignOut, typename Picked::Epilogue,
      typename Fused::Callbacks>::CollectiveOp;

  // NOTES: not CollectiveEpilogue::SharedStorage, which is rounded up to a kilobyte more: 128x128
  // has a stage more so. GemmKernel asserts that all fits.
  static constexpr int kBarrierBytes = 64;
  using BuiltMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Fp8, cutlass::layout::RowMajor,
      kAlignFp8, Fp8, cutlass::layout::ColumnMajor, kAlignFp8, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename CollectiveEpilogue::TensorStorage) + kBarrierBytes)>,
      typename Picked::Mainloop>::CollectiveOp;
  using CollectiveMainloop = ClassMainloop<cute::conditional_t<
      kPromoted, PromotedMainloop<BuiltMainloop>, BuiltMainloop>>;
  static constexpr bool kAhead = [] {
    if constexpr (kPromoted) return CollectiveMainloop::kAhead;
    return false;
  }();

  using Launched =
      GemmKernel<kSpec.schedule, CollectiveMainloop, CollectiveEpilogue, typename Fused::Root, Tile,
                 Cluster, kAccumulators, kAhead>;

  // NOTES: raising the shared-memory limit also loads the kernel's module, which must not happen
  // inside stream capture; so XLA's Initialize stage calls this.
  static char const* prepare() {
    cudaError_t const status = cudaFuncSetAttribute(
        reinterpret_cast<void const*>(&cutlass::device_kernel<Launched>),
        cudaFuncAttributeMaxDynamicSharedMemorySize, Launched::SharedStorageSize);
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
  }

  // The store of `rows` rows of n values at `out`; TMA has one descriptor for each.
  static auto store_of(GemmProblem const& p, Element* out, int64_t pitch, int rows, int n) {
    typename CollectiveEpilogue::Arguments args{};
    args.ptr_D = out;
    auto shape = cute::make_shape(rows, n, p.k, 1);
    if constexpr (kSwapped) {
      shape = cute::make_shape(n, rows, p.k, 1);
      args.dD = cute::make_stride(cute::_1{}, pitch, int64_t{0});
    } else {
      args.dD = cute::make_stride(pitch, cute::_1{}, int64_t{0});
    }
    args.dC = args.dD;
    return CollectiveEpilogue::to_underlying_arguments(shape, args, nullptr).tma_store_d;
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

  static DirectStoreArguments<Element> direct_store(GemmProblem const& p) {
    DirectStoreArguments<Element> direct{};
    if (p.out_pitch % kAlignOut == 0) return direct;
    direct.out = static_cast<Element*>(p.out);
    direct.pitch = p.out_pitch;
    direct.rows = p.m;
    direct.classes = p.classes.count;
    direct.step = p.classes.step;
    for (int r = 0; r < direct.classes && direct.classes > 1; ++r) {
      int const row_class = r * p.classes.factor % direct.classes;
      // Of row r, the features before its first multiple of a unit, and from there on whole 16 bytes.
      int const unit = p.classes.unit(), before = (unit - row_class * direct.step) % unit;
      int const whole = (p.n - before) / kAlignOut * kAlignOut;
      int const rows = (p.m - r + direct.classes - 1) / direct.classes;
      direct.first_row[row_class] = r;
      direct.tensor[row_class] = *store_of(p, direct.out + r * p.out_pitch + before,
                                           p.out_pitch * direct.classes, rows, whole)
                                      .get_tma_descriptor();
    }
    return direct;
  }

  static char const* launch(GemmProblem const& p) {
    auto const direct = direct_store(p);
    int64_t const tma_pitch = (p.out_pitch + kAlignOut - 1) / kAlignOut * kAlignOut;
    int const rows = p.classes.rows(p.m);
    auto const k_major = cute::make_stride(static_cast<int64_t>(p.k), cute::_1{}, int64_t{0});

    typename CollectiveMainloop::Arguments loads{};
    typename CollectiveEpilogue::Arguments stores{};
    stores.thread = Fused::arguments(p, direct);
    stores.ptr_D = static_cast<Element*>(p.out);
    loads.ptr_A = static_cast<Fp8 const*>(kSwapped ? p.rhs : p.lhs);
    loads.ptr_B = static_cast<Fp8 const*>(kSwapped ? p.lhs : p.rhs);
    loads.dA = loads.dB = k_major;
    auto shape = cute::make_shape(p.n, p.m, p.k, 1);
    if constexpr (kSwapped) {
      stores.dD = cute::make_stride(cute::_1{}, tma_pitch, int64_t{0});
    } else {
      // The tiles of the last class begin all but one step early, and have as much further to go.
      int const further = p.classes.count > 1 ? p.classes.unit() - p.classes.step : 0;
      shape = cute::make_shape(rows, p.n + further, p.k, p.classes.count);
      loads.dA = cute::make_stride(int64_t{p.k}, cute::_1{}, int64_t{p.k} * rows);
      stores.dD = cute::make_stride(tma_pitch, cute::_1{}, int64_t{0});
    }
    stores.dC = stores.dD;

    auto const readable = with_readable_rows(p, rows, shape);
    typename Launched::Params params{
        CollectiveMainloop::to_underlying_arguments(readable, loads, nullptr),
        CollectiveEpilogue::to_underlying_arguments(shape, stores, nullptr),
        shape,
        TileOrder(cute::get<0>(shape), cute::get<1>(shape), p.k, p.classes.count, kSpec.tile_m,
                  kSpec.tile_n, kSpec.cluster_m, kSpec.cluster_n),
        {}};
    params.prefetch = Prefetch(p, Launched::blocks(params, p.sm_count));
    if (direct.out != nullptr) {
      // Every store of CUTLASS's own but that of out[0, 0] is clipped away. It writes 16 bytes, all
      // of them right if the row has as many (else: epilogue.cuh). The buffer has as many: XLA's
      // are multiples of more.
      params.epilogue.tma_store_d = store_of(p, direct.out, tma_pitch, 1, 1);
    }
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
