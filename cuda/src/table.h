// Which kernel runs for a shape: the one that is expected to take least, by its row.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace jaxfp8 {

// Microseconds. A tile takes `k_tile` for each of its steps along K and `tile` besides: what is
// left of its epilogue where nothing hides it. `launch` comes once.
struct Row {
  Kernel kernel;
  double k_tile, tile, launch;
};

// Evidence: benchmarks/results/kernel-times.json (fast) and kernel-times-promoted.json, H200,
// 2026-11-24: dependent launch, weights rotated past the L2, 332 shapes: the grid of `gemm`, the
// shapes of `gemm --between` and eight further weights. `python -m benchmarks tune` fits the
// constants to such times and then searches near the fit for those whose choices cost least; these
// were searched from the constants for the kernels of 2026-11-22 and 23, and most have kept theirs.
// The best kernel's time / the chosen one's is 0.994 in geometric mean and 0.925 at worst
// (64x512x512), promoted 0.999 and 0.948 (300x3424x1280); with the fit alone 0.990 and 0.855, 0.998
// and 0.948. At 3 of the 332 the fast choice was not timed, at 1 the promoted. At 44 other shapes
// 0.989 and 0.871 (4500x1024x8192: the last wave is not full, and takes less than a whole one).
//
// By hand only: fast Pingpong 128x128 1x1 has the `k_tile` of 1x2 and 0.24 less `launch`. Where both are
// expected to take nearly the same, 1x1 runs if the product is small (1024x3424x1280 takes 9.4 us
// and with 1x2 9.6, without dependent launch 10.7 and 11.6; H200, 2026-11-23), and 1x2 if it is
// large: it reads less, and so leaves the tensor cores more power.
//
// Compiled, timed at all 332 shapes on 2026-11-22 and left out, as the best choice without them was
// 0.1 % slower in geometric mean: fast Cooperative 128x256, 256x128 and 128x160, fast Pingpong 64x128
// 2x1. The epilogue of 128x160 was slower then (five subtiles), and it was not timed again.
inline constexpr Row kTable[] = {
    // clang-format off
    // kernel                                 k_tile  tile   launch
    {Kernel::fast_swap_ws_64x16x256_1x1,      0.204, 1.333, 0.123},
    {Kernel::fast_swap_pp_64x16x256_2x1,      0.229, 0.653, 0.000},
    {Kernel::fast_swap_pp_64x32x256_1x1,      0.221, 0.447, 0.472},
    {Kernel::fast_swap_pp_64x64x256_1x1,      0.263, 0.354, 0.913},
    {Kernel::fast_swap_pp_64x64x128_1x2,      0.132, 0.380, 1.013},
    {Kernel::fast_swap_pp_64x128x128_1x1,     0.215, 0.467, 1.098},
    {Kernel::fast_pp_128x128x128_1x1,         0.382, 0.491, 1.500},
    {Kernel::fast_pp_128x128x128_1x2,         0.382, 0.445, 1.739},
    {Kernel::fast_pp_128x160x128_1x2,         0.476, 0.931, 2.869},
    {Kernel::fast_coop_128x80x128_1x2,        0.268, 1.196, 0.926},
    {Kernel::fast_coop_128x192x128_2x1,       0.575, 2.257, 0.061},
    {Kernel::promoted_swap_pp_64x32x128_1x1,  0.114, 0.243, 1.244},
    {Kernel::promoted_swap_pp_64x64x128_1x1,  0.144, 0.273, 1.110},
    {Kernel::promoted_swap_pp_64x128x128_1x1, 0.226, 0.359, 1.726},
    {Kernel::promoted_pp_128x128x128_1x1,     0.460, 0.463, 1.704},
    {Kernel::promoted_coop_128x80x128_1x2,    0.291, 1.433, 0.688},
    {Kernel::promoted_coop_128x128x128_1x1,   0.387, 2.099, 0.193},
    {Kernel::promoted_coop_128x160x128_2x1,   0.484, 2.565, 0.000},
    {Kernel::promoted_coop_128x192x128_2x1,   0.578, 2.387, 0.415},
    {Kernel::promoted_coop_256x128x128_1x2,   0.788, 1.984, 0.563},
    // clang-format on
};

// The multiprocessors of an H100 or H200 (SXM). A GPU with fewer makes the same choices.
inline constexpr int kMultiprocessors = 132;
inline constexpr int kFewRows = 64;
inline constexpr int64_t kCacheBytes = 50000000;  // L2
// What reaches the memory, and what comes from the L2 cache again, in bytes a microsecond; and when
// the first of it arrives.
inline constexpr double kMemoryRate = 3.55e6, kCacheRate = 85e6, kMemoryStart = 1.7;

// Microseconds to the sixth power. All tiles of a wave take the same time; behind that of the
// multiprocessors is the memory's, and near to where they are equal neither hides the other.
constexpr double expected_time6(Row const& row, int m, int n, int k) {
  KernelSpec const& spec = spec_of(row.kernel);
  bool const swapped = spec.operands == Operands::kSwapped;
  auto const parts = [](int64_t size, int64_t part) { return (size + part - 1) / part; };
  int64_t const span_m = spec.tile_m * spec.cluster_m, span_n = spec.tile_n * spec.cluster_n;
  int64_t const clusters = parts(swapped ? n : m, span_m) * parts(swapped ? m : n, span_n);
  int64_t const waves = parts(clusters, kMultiprocessors / (spec.cluster_m * spec.cluster_n));
  double const once = static_cast<double>(n) * k + static_cast<double>(m) * k + 2.0 * m * n;
  double const loaded = static_cast<double>(clusters * (span_m + span_n)) * k;
  double const again = loaded > once ? loaded - once : 0;
  double const compute = waves * (parts(k, spec.tile_k) * row.k_tile + row.tile) + row.launch;
  double const memory = once / kMemoryRate + again / kCacheRate + kMemoryStart;
  auto const power6 = [](double t) { return t * t * t * t * t * t; };
  return power6(compute) + power6(memory);
}

// Tiles of few rows, each of which reads the weight. Those of 16 are for few rows: without this rule
// 64x1280x3424 goes to two such in a cluster and takes 5.7 us; with tiles of 32 rows it takes 4.7.
// Promoted, one tile of 64 rows is faster than expected where several of 32 would read a weight that
// the L2 cache cannot hold: 33x4096x14336 takes 18.6 us by it and 20.4 by those of 32, which are
// expected to be faster. The promoted choices are worth 0.9991 with this rule and 0.9981 without, the
// fast ones 0.9940 with it and 0.9942 without.
constexpr bool is_for(KernelSpec const& spec, int m, int n, int k) {
  if (spec.operands == Operands::kNormal || spec.tile_n > 32) return true;
  if (spec.tile_n <= 16 && m >= kFewRows) return false;
  return spec.accumulation == Accumulation::kFast || m <= spec.tile_n ||
         int64_t{n} * k <= kCacheBytes;
}

// The kernel for a shape; `forced` >= 0 names one outright (tests and tuning).
constexpr Kernel choose(int m, int n, int k, bool promoted, int forced = -1) {
  if (forced >= 0) return static_cast<Kernel>(forced);
  auto const accumulation = promoted ? Accumulation::kPromoted : Accumulation::kFast;
  Row const* best = nullptr;
  double least = 0;
  for (Row const& row : kTable) {
    KernelSpec const& spec = spec_of(row.kernel);
    if (spec.accumulation != accumulation || !is_for(spec, m, n, k)) continue;
    double const time = expected_time6(row, m, n, k);
    if (best == nullptr || time < least) best = &row, least = time;
  }
  return best->kernel;
}
static_assert(spec_of(choose(1, 1, 16, false)).accumulation == Accumulation::kFast);
static_assert(spec_of(choose(1, 1, 16, true)).accumulation == Accumulation::kPromoted);

// Whether the GEMM of a dense call starts while the quantize kernel before it still runs
// (programmatic dependent launch, with an early trigger). An MLP block without and with, us (H200):
// 4096-14336 at M = 256 66.5 and 66.7, at 1024 196.1 and 196.5, at 4096 768 and 776 (2026-11-23); of
// earlier kernels at M = 16 40.1 and 37.6, at 128 47.9 and 46.3, and 1280-3424 at M = 256 19.2 and
// 18.1, at 4096 96.6 and 93.8 (2026-11-22). A GEMM after a GEMM gains at every size (kernel.cuh).
inline bool starts_early(int m, int n, int k) {
  constexpr int64_t kSmallWeight = 8 << 20;
  return m <= 128 || int64_t{n} * k <= kSmallWeight;
}

}  // namespace jaxfp8
