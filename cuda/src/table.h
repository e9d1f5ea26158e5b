// Which kernel runs for a shape. First match wins; a new row is one line, with its evidence.
#pragma once

#include "kernels.h"

namespace jaxfp8 {

inline constexpr int kAny = 1 << 30;

// A row matches if M <= max_m, min_n <= N <= max_n and K >= min_k.
struct Row {
  Accumulation accumulation;
  int max_m, min_n, max_n, min_k;
  Kernel kernel;
  int swizzle;  // tiles in a group walked together, for L2 reuse of the shared operand
};

// Evidence: one H200, 2026-11-22, `python -m benchmarks gemm --kernels all`: CUDA-graph replay,
// interleaved, weights rotated past the L2, 60 shapes, dependent launch where the layer uses it.
// The last column: (time of the runner-up named / this kernel's) at the shapes of the row.
inline constexpr Row kTable[] = {
    // clang-format off
    // accumulation      M     N from    to    K from  kernel                               swizzle
    {Accumulation::kFast, 16, 16384, kAny, 0, Kernel::fast_swap_pp_64x16x256_2x1, 1},    // ws 1.07-1.10
    {Accumulation::kFast, 16, 3585, 6143, 8192, Kernel::fast_swap_ws_64x16x256_1x1, 1},  // pp 2x1 0.98-1.04
    {Accumulation::kFast, 16, 3585, 6143, 0, Kernel::fast_swap_pp_64x16x256_2x1, 1},     // ws 1.03-1.07
    {Accumulation::kFast, 16, 0, kAny, 0, Kernel::fast_swap_ws_64x16x256_1x1, 1},        // pp 2x1 1.00-1.03
    {Accumulation::kFast, 32, 0, 2048, 0, Kernel::fast_swap_pp_64x16x256_2x1, 1},        // ws 64x32 1.08
    {Accumulation::kFast, 32, 0, 3584, 0, Kernel::fast_swap_ws_64x32x256_1x1, 1},        // pp 64x32 1.05
    {Accumulation::kFast, 32, 0, kAny, 0, Kernel::fast_swap_pp_64x32x256_1x1, 1},        // ws 64x32 0.99-1.08
    {Accumulation::kFast, 64, 0, 3584, 0, Kernel::fast_swap_ws_64x32x256_1x1, 1},        // pp 64x32 1.00-1.02
    {Accumulation::kFast, 64, 0, kAny, 0, Kernel::fast_swap_pp_64x64x256_1x1, 1},        // 64x32 1.07-1.19
    {Accumulation::kFast, 128, 0, 2048, 0, Kernel::fast_swap_pp_64x32x256_1x1, 1},       // ws 64x32 1.02, 64x64 1.04-1.08
    {Accumulation::kFast, 128, 0, 3584, 0, Kernel::fast_swap_pp_64x64x256_1x1, 1},       // 64x64x128 1.04
    {Accumulation::kFast, 128, 0, 6143, 0, Kernel::fast_swap_pp_64x64x128_1x2, 1},       // 64x64x256 1.10-1.17
    {Accumulation::kFast, 128, 0, kAny, 0, Kernel::fast_pp_64x128x128_2x1, 1},           // swapped 64x128 1.01-1.02
    {Accumulation::kFast, 256, 0, 2048, 0, Kernel::fast_swap_pp_64x64x256_1x1, 1},       // 64x64x128 1.01
    {Accumulation::kFast, 256, 6144, 16383, 0, Kernel::fast_pp_128x128x128_1x1, 1},      // swapped 64x128 1.01
    {Accumulation::kFast, 256, 0, kAny, 0, Kernel::fast_swap_pp_64x128x128_1x1, 1},      // 64x128 2x1 1.03-1.05
    {Accumulation::kFast, 512, 0, 6143, 8192, Kernel::fast_pp_128x128x128_1x1, 1},       // swapped 64x128 1.02
    {Accumulation::kFast, 512, 0, 6143, 0, Kernel::fast_swap_pp_64x128x128_1x1, 1},      // 64x128 2x1, 128x128 1.04-1.06
    {Accumulation::kFast, 512, 16384, kAny, 0, Kernel::fast_pp_128x128x128_1x2, 4},      // 1x1 0.98-1.02
    {Accumulation::kFast, 2048, 0, kAny, 0, Kernel::fast_pp_128x128x128_1x1, 1},         // 128x256 1.00-1.5
    {Accumulation::kFast, kAny, 0, 2048, 0, Kernel::fast_pp_128x128x128_1x2, 1},         // 1x1 1.0-1.07
    {Accumulation::kFast, kAny, 6144, 16383, 6144, Kernel::fast_coop_128x256x128_2x1, 4},// 128x128 0.94-1.16: power decides
    {Accumulation::kFast, kAny, 0, kAny, 0, Kernel::fast_pp_128x128x128_1x1, 4},         // 1x2 0.99-1.02

    {Accumulation::kPromoted, 64, 0, kAny, 0, Kernel::promoted_swap_pp_64x32x128_1x1, 1},    // 128x128 1.5-2.2
    {Accumulation::kPromoted, 128, 0, 6143, 0, Kernel::promoted_swap_pp_64x32x128_1x1, 1},   // 128x128 1.1-1.8
    {Accumulation::kPromoted, kAny, 16384, kAny, 0, Kernel::promoted_coop_128x192x128_2x1, 1}, // 128x128 1.05-1.12
    {Accumulation::kPromoted, 3072, 0, kAny, 0, Kernel::promoted_coop_128x128x128_2x1, 1},   // 128x192 0.99-1.31
    {Accumulation::kPromoted, kAny, 0, kAny, 0, Kernel::promoted_coop_128x192x128_2x1, 1},   // 128x128 1.00-1.13
    // clang-format on
};

constexpr Row const& select_row(int m, int n, int k, bool promoted) {
  auto const accumulation = promoted ? Accumulation::kPromoted : Accumulation::kFast;
  for (Row const& row : kTable) {
    if (row.accumulation == accumulation && m <= row.max_m && n >= row.min_n && n <= row.max_n &&
        k >= row.min_k) {
      return row;
    }
  }
  return kTable[0];  // not reached: the last row of either kind matches everything
}

constexpr bool every_shape_has_a_row() {
  bool fast = false, promoted = false;
  for (Row const& row : kTable) {
    bool const all = row.max_m == kAny && row.min_n == 0 && row.max_n == kAny && row.min_k == 0;
    (row.accumulation == Accumulation::kFast ? fast : promoted) |= all;
    if (spec_of(row.kernel).accumulation != row.accumulation) return false;
  }
  return fast && promoted;
}
static_assert(every_shape_has_a_row(), "a shape without a row, or a kernel of the wrong kind");

// Up to here the GEMM starts while the quantize kernel still runs (programmatic dependent launch).
// Prototype on an H200, 2026-11-22: 5-30 % of a GEMM up to M = 128, most on small weights; about
// even at 256; above, blocks that wait keep the multiprocessors from the quantize kernel, and an
// MLP block at M = 1024 lost 18 us.
inline constexpr int kDependentMaxM = 128;

struct Choice {
  Kernel kernel;
  int swizzle;
};

// The kernel for a shape; `forced` >= 0 names one outright (tests and tuning).
inline Choice choose(int m, int n, int k, bool promoted, int forced) {
  if (forced >= 0) return {static_cast<Kernel>(forced), 1};
  Row const& row = select_row(m, n, k, promoted);
  return {row.kernel, row.swizzle};
}

}  // namespace jaxfp8
