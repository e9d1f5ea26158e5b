// What a kernel brings into the L2 cache before it waits for anything.
#pragma once

#include <algorithm>

#include "cutlass/cutlass.h"
#include "gemm.h"

namespace jaxfp8 {

// NOTES: the epilogue wants the weight's scales and the bias, and they are as cold as the weight. With
// dependent launch the memory idles while the kernel before ends, so the weight's first 4 megabytes
// are fetched as well: up to 2 % of an MLP block, where 16 MB cost it 8 % (H200, 2026-11-22). Nothing
// is read here, only brought into L2, which sees later writes: so that kernel may be writing them.
struct Prefetch {
  char const* weight;
  uint32_t weight_bytes_a_block;  // each block fetches its share, wherever its tiles are
  float const* vectors[2];        // the weight's scales and the bias
  int lines[2];                   // of 128 bytes

  Prefetch() = default;
  Prefetch(GemmProblem const& p, int blocks)
      : weight(static_cast<char const*>(p.rhs)),
        weight_bytes_a_block(0),
        vectors{p.rhs_scale, p.bias},
        lines{lines_of(p.per_channel ? p.n : 1), p.bias != nullptr ? lines_of(p.bias_features) : 0} {
    if (p.dependent) {
      int64_t const bytes = std::min(int64_t{p.n} * p.k, kWeightBytes);
      weight_bytes_a_block = static_cast<uint32_t>(bytes / blocks / 128 * 128);
    }
  }

  // By three warps of each block.
  CUTLASS_DEVICE void operator()(int warp) const {
    int const lane = threadIdx.x % 32, block = blockIdx.x + gridDim.x * blockIdx.y;
    int const blocks = gridDim.x * gridDim.y;
    if (warp == 2) {
      char const* const share = weight + int64_t{block} * weight_bytes_a_block;
      for (uint32_t at = 0; lane == 0 && at < weight_bytes_a_block; at += kBytesAtOnce) {
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(share + at),
                     "r"(min(weight_bytes_a_block - at, kBytesAtOnce)));
      }
      return;
    }
    for (int line = block + lane * blocks; line < lines[warp]; line += 32 * blocks) {
      asm volatile("prefetch.global.L2 [%0];" ::"l"(vectors[warp] + line * kLine));
    }
  }

 private:
  static constexpr int kLine = 32;  // floats
  static constexpr int64_t kWeightBytes = 4 << 20;
  static constexpr uint32_t kBytesAtOnce = 64 << 10;  // one instruction of megabytes is untried
  static int lines_of(int n) { return (n + kLine - 1) / kLine; }
};

}  // namespace jaxfp8
