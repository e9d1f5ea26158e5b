// Which kernel runs for a shape: the one that is expected to take least, by its row.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.h"

namespace jaxfp8 {

// Microseconds. A tile takes `k_tile` for each of its steps along K and `tile` besides: what is
// left of its epilogue where nothing hides it. `launch` comes once.
struct Row {
  Kernel kernel;
  double k_tile, tile, launch;
};

// What a kernel finds: x in whole tiles behind another kernel; so, but behind the quantize kernel of
// the same call; or x of m rows and no more, so that TMA fills the rest of a tile with zeros.
enum class Input { kWholeTiles, kQuantizedHere, kRowsAlone };

// Evidence: benchmarks/results/kernel-times.json (fast) and kernel-times-promoted.json, H200,
// 2026-11-30: dependent launch, weights rotated past the L2, 332 shapes: the grid of `gemm`, the
// shapes of `gemm --between` and eight further weights. `python -m benchmarks tune` fits the
// constants to such times and then searches near the fit for those whose choices cost least. The
// promoted kernels have the best of 60 such searches from fits changed at random. The fast ones of
// up to 64x64 and the memory have the constants of the times of 2026-11-24, with which few rows
// behind a quantize kernel were timed (kLate); those of larger ones were changed at random where
// that cost less, but for the choices of `gemm`'s grid from K = 4096 on: there another table with
// as good a score cost MLP blocks 2 to 4 % behind quantize (Pingpong in place of Cooperative
// 128x128 for 512x4096x14336, 49.8 us in the block and 44.0). The best kernel's time / the chosen
// one's is 0.997 in geometric mean and 0.928 at worst (1500x512x3584), promoted 0.998 and 0.933
// (64x2304x768); with the fit alone 0.992 and 0.817, 0.992 and 0.923. At 44 other shapes 0.991 and
// 0.884 (350x3424x1280; before 0.992 and the same), promoted 0.999 and 0.981 (80x1280x1280).
//
// The fastest of the 20 fast kernels takes 0.79 to 1.01 of the time of the fastest of the 11 that
// were here before: blocks of a cluster load x or the weight once for all of them, and a cluster of
// two or four has more multiprocessors load the weight than there are tiles with rows of x in them.
//
// Compiled, timed and left out, as the best choice without them was at most 0.1 % slower in
// geometric mean: on 2026-11-22 fast Cooperative 128x256, fast Pingpong 64x128 2x1; on 2026-11-24
// fast 256x128 1x2 and 2x1, 64x256 of both operand orders, 128x64, 128x128 2x2 and 128x160 2x2,
// 64x80 2x2, swapped 64x64x256 of two; promoted clusters of 128x128; on 2026-11-30, beside the
// present ones at 14 large shapes, fast 256x128 and 128x256 in clusters of two and Pingpong 128x128
// 2x1. Promoted Pingpong 128x128 is the best at 3 of these 376 shapes. How many clusters of eight
// run at once is another number on every chip.
inline constexpr Row kTable[] = {
    // clang-format off
    // kernel                                  k_tile  tile   launch
    {Kernel::fast_swap_pp_64x16x256_1x2,       0.197, 0.000, 1.177},
    {Kernel::fast_swap_pp_64x16x256_2x1,       0.262, 0.669, 0.305},
    {Kernel::fast_swap_pp_64x32x256_1x1,       0.221, 0.356, 0.800},
    {Kernel::fast_swap_pp_64x32x256_1x2,       0.212, 0.084, 1.361},
    {Kernel::fast_swap_pp_64x64x256_1x1,       0.281, 0.175, 1.227},
    {Kernel::fast_swap_pp_64x64x128_1x2,       0.136, 0.186, 1.368},
    {Kernel::fast_swap_pp_64x64x128_1x4,       0.127, 0.406, 0.898},
    {Kernel::fast_swap_pp_64x128x128_1x1,      0.229, 0.268, 1.501},
    {Kernel::fast_swap_pp_64x128x128_1x4,      0.207, 0.302, 1.164},
    {Kernel::fast_pp_64x16x256_1x4,            0.133, 0.306, 1.298},
    {Kernel::fast_pp_64x32x256_1x4,            0.186, 0.155, 1.102},
    {Kernel::fast_pp_64x48x256_1x4,            0.229, 0.580, 1.554},
    {Kernel::fast_pp_64x64x256_1x4,            0.316, 0.113, 1.276},
    {Kernel::fast_pp_128x128x128_1x1,          0.378, 0.268, 1.966},
    {Kernel::fast_pp_128x128x128_1x2,          0.370, 0.193, 3.976},
    {Kernel::fast_pp_128x160x128_2x1,          0.450, 0.508, 3.682},
    {Kernel::fast_coop_128x80x128_2x1,         0.262, 1.033, 1.289},
    {Kernel::fast_coop_128x128x128_2x1,        0.375, 1.173, 1.353},
    {Kernel::fast_coop_128x160x128_2x1,        0.466, 1.324, 1.746},
    {Kernel::fast_coop_128x192x128_2x1,        0.535, 2.138, 1.677},
    {Kernel::promoted_swap_pp_64x32x128_1x1,   0.156, 0.076, 1.335},
    {Kernel::promoted_swap_pp_64x32x128_1x2,   0.134, 0.000, 1.488},
    {Kernel::promoted_swap_pp_64x64x128_1x1,   0.165, 0.175, 1.236},
    {Kernel::promoted_swap_pp_64x128x128_1x1,  0.242, 0.164, 1.872},
    {Kernel::promoted_pp_64x32x128_1x4,        0.110, 0.139, 1.905},
    {Kernel::promoted_pp_128x128x128_1x1,      0.464, 0.263, 2.398},
    {Kernel::promoted_coop_128x80x128_1x2,     0.297, 0.914, 1.530},
    {Kernel::promoted_coop_128x128x128_1x1,    0.415, 1.229, 1.268},
    {Kernel::promoted_coop_128x160x128_2x1,    0.528, 1.140, 1.435},
    {Kernel::promoted_coop_128x192x128_2x1,    0.621, 1.006, 2.060},
    {Kernel::promoted_coop_256x128x128_1x2,    0.813, 2.666, 1.323},
    // clang-format on
};

// The multiprocessors of an H100 or H200 (SXM). A GPU with fewer makes the same choices.
inline constexpr int kMultiprocessors = 132;
// What reaches the memory, and what comes from the L2 cache again, in bytes a microsecond; and when
// the first of it arrives.
inline constexpr double kMemoryRate = 4.86e6, kCacheRate = 51e6, kMemoryStart = 1.77;
// What two multiprocessors that share a way to the memory (a TPC) get at most, or one of them alone.
inline constexpr double kPairRate = 113e3;

// What the steps of the last wave take less if few multiprocessors are at work in it: this share if
// nearly none are.
inline constexpr double kLastWave = 0.20;

// What clusters that fill the GPU take more behind the quantize kernel of few rows, whose blocks keep
// others off their multiprocessors: behind a GEMM 16x4096x14336 takes 15.7 us in 64 clusters of two
// and 16.7 in 64 blocks, behind quantize 17.4 and 16.5. A block of MLP 4096-14336 takes 38.4, 39.0
// and 39.6 us at M = 1, 16 and 32 as the table alone would have it, and 36.8, 38.0 and 38.5 with
// swapped 64x16 2x1 and 64x32 1x1 in place of 64x16 1x2 and normal 64x64 1x4; but at 64 41.1, and 44.7
// so. Clusters on 80 multiprocessors lose nothing (1280x3424; H200, 2026-11-24). By this figure the
// block has the kernels it was fastest with. Promoted ones were not timed so.
inline constexpr double kLate = 1.8;
inline constexpr int kFewRows = 32, kManyBlocks = kMultiprocessors * 3 / 4;

// Microseconds to the sixth power. All tiles of a wave take the same time; behind that of the
// multiprocessors is the memory's, and near to where they are equal neither hides the other.
//
// NOTES: while the memory is all in use each pair of multiprocessors gets the same. In a last wave of
// 80 blocks 52 have theirs for themselves and are done when the 14 other pairs have half to go, which
// are too few to use all of the memory: 16x5120x5120 takes 10.7 us in 80 tiles and 8.6 in 108; the
// memory gives 3.0 TB/s there, and 3.9 to 64 tiles of 4096 features (H200, 2026-11-24).
constexpr double expected_time6(Row const& row, int m, int n, int k, Input input) {
  KernelSpec const& spec = spec_of(row.kernel);
  bool const swapped = spec.operands == Operands::kSwapped;
  auto const parts = [](int64_t size, int64_t part) { return (size + part - 1) / part; };
  int64_t const span_m = spec.tile_m * spec.cluster_m, span_n = spec.tile_n * spec.cluster_n;
  int64_t const clusters = parts(swapped ? n : m, span_m) * parts(swapped ? m : n, span_n);
  int const cluster = spec.cluster_m * spec.cluster_n;
  int const resident = resident_clusters(kMultiprocessors, cluster);
  int64_t const waves = parts(clusters, resident);
  double const idle = waves - static_cast<double>(clusters) / resident;  // of the last one
  double const once = static_cast<double>(n) * k + static_cast<double>(m) * k + 2.0 * m * n;
  double const loaded = static_cast<double>(clusters * (span_m + span_n)) * k;
  double const again = loaded > once ? loaded - once : 0;
  double const steps = (waves - kLastWave * idle) * parts(k, spec.tile_k);
  bool const is_late = input == Input::kQuantizedHere && m <= kFewRows && cluster > 1 &&
                       std::min<int64_t>(clusters, resident) * cluster > kManyBlocks;
  double const compute = steps * row.k_tile + waves * row.tile + row.launch + (is_late ? kLate : 0);
  double memory = once / kMemoryRate + again / kCacheRate + kMemoryStart;
  if (int64_t const last = clusters % resident * cluster; last > 0) {
    constexpr int kPairs = kMultiprocessors / 2;
    double const left = last > kPairs ? last - kPairs : last;
    double const behind = 1 / kPairRate - left / kMemoryRate;
    if (behind > 0) memory += once / (clusters * cluster) * behind;
  }
  auto const power6 = [](double t) { return t * t * t * t * t * t; };
  return power6(compute) + power6(memory);
}

// Zeros cost more than rows that are read (gemm.cuh), and a cluster has more of them. Two products
// 16x14336x4096 of one quantized x took 38.6 us in tiles of 64 rows and clusters of four, and 33.7 in
// tiles of 16 (H200, 2026-11-24). Clusters of two are left out for few rows only: of more, zeros are a
// small share. The limits are not timed.
constexpr bool is_for(KernelSpec const& spec, int m, Input input) {
  constexpr int kSome = 128, kFewZeros = 16;  // rows
  int const cluster = spec.cluster_m * spec.cluster_n;
  if (input != Input::kRowsAlone || cluster == 1 || (cluster == 2 && m > kSome)) return true;
  bool const swapped = spec.operands == Operands::kSwapped;
  int const rows = swapped ? spec.tile_n * spec.cluster_n : spec.tile_m * spec.cluster_m;
  return (m + rows - 1) / rows * rows - m < kFewZeros;
}

// The kernel for a shape; `forced` >= 0 names one outright (tests and tuning).
constexpr Kernel choose(int m, int n, int k, bool promoted, int forced = -1,
                        Input input = Input::kWholeTiles) {
  if (forced >= 0) return static_cast<Kernel>(forced);
  auto const accumulation = promoted ? Accumulation::kPromoted : Accumulation::kFast;
  Row const* best = nullptr;
  double least = 0;
  for (Row const& row : kTable) {
    KernelSpec const& spec = spec_of(row.kernel);
    if (spec.accumulation != accumulation || !is_for(spec, m, input)) continue;
    double const time = expected_time6(row, m, n, k, input);
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
