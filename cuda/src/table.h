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
// The last column: (time of the runner-up named / this kernel's) at the shapes of the row, under
// CUTLASS's own kernel layer; under kernel.cuh only the rows of M = 256 and 512 up to N of 6143 were
// looked at again, and two of them changed, in a sweep that is not kept. "ws
// 64x32", warp-specialized without a second consumer, lost everywhere and is compiled no more.
inline constexpr Row kTable[] = {
    // clang-format off
    // accumulation      M     N from    to    K from  kernel                               swizzle
    {Accumulation::kFast, 16, 0, 2048, 0, Kernel::fast_swap_ws_64x16x256_1x1, 1},        // pp 2x1 1.05-1.07
    {Accumulation::kFast, 16, 0, kAny, 0, Kernel::fast_swap_pp_64x16x256_2x1, 1},        // ws 1.00-1.11
    {Accumulation::kFast, 32, 0, 2048, 0, Kernel::fast_swap_pp_64x16x256_2x1, 1},        // ws 64x16 1.06
    {Accumulation::kFast, 32, 0, kAny, 0, Kernel::fast_swap_pp_64x32x256_1x1, 1},        // ws 64x32 1.02-1.12
    {Accumulation::kFast, 64, 0, 3584, 0, Kernel::fast_swap_pp_64x32x256_1x1, 1},        // 64x64 1.03, ws 64x32 1.01-1.07
    {Accumulation::kFast, 64, 0, kAny, 0, Kernel::fast_swap_pp_64x64x256_1x1, 1},        // 64x32 1.05-1.16
    {Accumulation::kFast, 128, 0, 2048, 0, Kernel::fast_swap_pp_64x32x256_1x1, 1},       // ws 64x32 1.05, 64x64 1.08
    {Accumulation::kFast, 128, 0, 6143, 0, Kernel::fast_swap_pp_64x64x128_1x2, 1},       // 64x64x256 1.01-1.17
    {Accumulation::kFast, 128, 0, kAny, 0, Kernel::fast_pp_64x128x128_2x1, 1},           // swapped 64x128 1.01-1.03
    {Accumulation::kFast, 256, 0, 2048, 0, Kernel::fast_swap_pp_64x64x128_1x2, 1},       // 64x64x256 1.03
    {Accumulation::kFast, 256, 0, 6143, 0, Kernel::fast_swap_pp_64x128x128_1x1, 1},      // 64x128 2x1 1.05-1.06
    {Accumulation::kFast, 256, 6144, kAny, 0, Kernel::fast_pp_128x128x128_1x1, 1},       // swapped 64x128 1.02-1.06
    {Accumulation::kFast, 512, 0, 3584, 0, Kernel::fast_swap_pp_64x128x128_1x1, 1},      // 64x128 2x1 1.00-1.06
    {Accumulation::kFast, 2048, 0, kAny, 0, Kernel::fast_pp_128x128x128_1x1, 1},         // 1x2 1.00-1.09, 128x256 1.01-1.05
    {Accumulation::kFast, kAny, 0, 3584, 0, Kernel::fast_pp_128x128x128_1x2, 1},         // 1x1 1.00-1.05
    {Accumulation::kFast, kAny, 6144, 16383, 6144, Kernel::fast_coop_128x256x128_2x1, 4},// 128x128 0.94-1.16: power decides
    {Accumulation::kFast, kAny, 16384, kAny, 0, Kernel::fast_pp_128x128x128_1x2, 1},     // 1x1 1.00-1.02
    {Accumulation::kFast, kAny, 0, kAny, 0, Kernel::fast_pp_128x128x128_1x1, 4},         // 1x2 0.99-1.01

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

// Whether the GEMM of a dense call starts while the quantize kernel before it still runs
// (programmatic dependent launch, with an early trigger). H200, 2026-11-22, an MLP block without and
// with, us: 4096-14336 at M = 16 40.1 and 37.6, at 128 47.9 and 46.3, at 256 66.1 and 67.5, at 1024
// 191 and 198, at 4096 765 and 844; 1280-3424 at M = 256 19.2 and 18.1, at 4096 96.6 and 93.8.
// A GEMM after a GEMM, without a trigger so early, gains at every size: 1-7 % up to M = 1024.
inline bool starts_early(int m, int n, int k) {
  constexpr int64_t kSmallWeight = 8 << 20;
  return m <= 128 || int64_t{n} * k <= kSmallWeight;
}

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
