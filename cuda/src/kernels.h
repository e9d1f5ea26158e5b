// The compiled kernels, each for every output type (CMake reads the names). Which of them runs is
// decided in table.h.
#pragma once

namespace jaxfp8 {

enum class Schedule { kPingpong, kCooperative };

// NOTES: a swapped kernel computes D^T = W X^T, so that WGMMA's fixed 64 rows run over output
// features and its 8..256 columns over the rows of x. Tile and cluster are of the product as it is
// launched: under "swapped" their M runs over output features.
enum class Operands { kNormal, kSwapped };

// NOTES: fast accumulation stays inside the tensor core, about 14 bits wide; promoted adds the
// partial sums to float32 registers every 4 MMAs.
enum class Accumulation { kFast, kPromoted };

struct KernelSpec {
  const char* name;
  int tile_m, tile_n, tile_k;
  int cluster_m, cluster_n;
  Schedule schedule;
  Operands operands;
  Accumulation accumulation;
};

// NOTES: promoted kernels hold two further sets of sums beside the tile's (promoted_mainloop.cuh):
// at most 192 in each thread (no spills, nvcc 13.0).
#define JAXFP8_KERNELS(X)                                                                 \
  X(fast_swap_pp_64x16x256_1x2, 64, 16, 256, 1, 2, kPingpong, kSwapped, kFast)            \
  X(fast_swap_pp_64x16x256_2x1, 64, 16, 256, 2, 1, kPingpong, kSwapped, kFast)            \
  X(fast_swap_pp_64x32x256_1x1, 64, 32, 256, 1, 1, kPingpong, kSwapped, kFast)            \
  X(fast_swap_pp_64x32x256_1x2, 64, 32, 256, 1, 2, kPingpong, kSwapped, kFast)            \
  X(fast_swap_pp_64x64x256_1x1, 64, 64, 256, 1, 1, kPingpong, kSwapped, kFast)            \
  X(fast_swap_pp_64x64x128_1x2, 64, 64, 128, 1, 2, kPingpong, kSwapped, kFast)            \
  X(fast_swap_pp_64x64x128_1x4, 64, 64, 128, 1, 4, kPingpong, kSwapped, kFast)            \
  X(fast_swap_pp_64x128x128_1x1, 64, 128, 128, 1, 1, kPingpong, kSwapped, kFast)          \
  X(fast_swap_pp_64x128x128_1x4, 64, 128, 128, 1, 4, kPingpong, kSwapped, kFast)          \
  X(fast_pp_64x16x256_1x4, 64, 16, 256, 1, 4, kPingpong, kNormal, kFast)                  \
  X(fast_pp_64x32x256_1x4, 64, 32, 256, 1, 4, kPingpong, kNormal, kFast)                  \
  X(fast_pp_64x48x256_1x4, 64, 48, 256, 1, 4, kPingpong, kNormal, kFast)                  \
  X(fast_pp_64x64x256_1x4, 64, 64, 256, 1, 4, kPingpong, kNormal, kFast)                  \
  X(fast_pp_128x128x128_1x1, 128, 128, 128, 1, 1, kPingpong, kNormal, kFast)              \
  X(fast_pp_128x128x128_1x2, 128, 128, 128, 1, 2, kPingpong, kNormal, kFast)              \
  X(fast_pp_128x160x128_2x1, 128, 160, 128, 2, 1, kPingpong, kNormal, kFast)              \
  X(fast_coop_128x80x128_2x1, 128, 80, 128, 2, 1, kCooperative, kNormal, kFast)           \
  X(fast_coop_128x128x128_2x1, 128, 128, 128, 2, 1, kCooperative, kNormal, kFast)         \
  X(fast_coop_128x160x128_2x1, 128, 160, 128, 2, 1, kCooperative, kNormal, kFast)         \
  X(fast_coop_128x192x128_2x1, 128, 192, 128, 2, 1, kCooperative, kNormal, kFast)         \
  X(promoted_swap_pp_64x32x128_1x1, 64, 32, 128, 1, 1, kPingpong, kSwapped, kPromoted)    \
  X(promoted_swap_pp_64x32x128_1x2, 64, 32, 128, 1, 2, kPingpong, kSwapped, kPromoted)    \
  X(promoted_swap_pp_64x64x128_1x1, 64, 64, 128, 1, 1, kPingpong, kSwapped, kPromoted)    \
  X(promoted_swap_pp_64x128x128_1x1, 64, 128, 128, 1, 1, kPingpong, kSwapped, kPromoted)  \
  X(promoted_pp_64x32x128_1x4, 64, 32, 128, 1, 4, kPingpong, kNormal, kPromoted)          \
  X(promoted_pp_128x128x128_1x1, 128, 128, 128, 1, 1, kPingpong, kNormal, kPromoted)      \
  X(promoted_coop_128x80x128_1x2, 128, 80, 128, 1, 2, kCooperative, kNormal, kPromoted)   \
  X(promoted_coop_128x128x128_1x1, 128, 128, 128, 1, 1, kCooperative, kNormal, kPromoted) \
  X(promoted_coop_128x160x128_2x1, 128, 160, 128, 2, 1, kCooperative, kNormal, kPromoted) \
  X(promoted_coop_128x192x128_2x1, 128, 192, 128, 2, 1, kCooperative, kNormal, kPromoted) \
  X(promoted_coop_256x128x128_1x2, 256, 128, 128, 1, 2, kCooperative, kNormal, kPromoted)

enum class Kernel : int {
#define JAXFP8_ENUM(name, ...) name,
  JAXFP8_KERNELS(JAXFP8_ENUM)
#undef JAXFP8_ENUM
      kCount
};

inline constexpr int kKernelCount = static_cast<int>(Kernel::kCount);

inline constexpr KernelSpec kKernelSpecs[] = {
#define JAXFP8_SPEC(name, tm, tn, tk, cm, cn, schedule, operands, accumulation) \
  {#name, tm, tn, tk, cm, cn, Schedule::schedule, Operands::operands, Accumulation::accumulation},
    JAXFP8_KERNELS(JAXFP8_SPEC)
#undef JAXFP8_SPEC
};

constexpr KernelSpec const& spec_of(Kernel kernel) {
  return kKernelSpecs[static_cast<int>(kernel)];
}

// How many clusters of so many blocks, one to a multiprocessor, surely run at once.
//
// NOTES: the blocks of a cluster share a GPC, of which there are 8; if each has an even number of
// multiprocessors, each may leave two over of clusters of four. An H200 with 132 says 30
// (cudaOccupancyMaxActiveClusters), and GPCs cut otherwise have 29 at least. Launched as 32 clusters,
// of which some wait for others to end, normal 64x32x256 took 9.2 us for 48x4096x4096, as 29 with more
// than a tile each 7.5 (H200, 2026-11-24).
constexpr int resident_clusters(int multiprocessors, int size) {
  constexpr int kGpcs = 8;
  int const left_over = size > 2 ? kGpcs * (size - 2) : 0;
  int const resident = (multiprocessors - left_over) / size;
  return resident > 1 ? resident : 1;
}
static_assert(resident_clusters(132, 1) == 132 && resident_clusters(132, 2) == 66 &&
              resident_clusters(132, 4) == 29);

}  // namespace jaxfp8
