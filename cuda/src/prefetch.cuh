// What a kernel brings into the L2 cache before it waits for anything.
#pragma once

#include <algorithm>

#include "cutlass/cutlass.h"
#include "gemm.h"

namespace jaxfp8 {

// NOTES: the epilogue wants the weight's scales and the bias when the product is done, and they are
// as cold as the weight: 0.1-0.4 us of a GEMM of 4-8 us (H200, 2026-11-22). With dependent launch
// the multiprocessors and the memory idle while the quantize kernel runs, so the weight's first 4
// megabytes are fetched as well: up to 2 % of an MLP block, where 16 MB cost it 8 %. Only what is
// older than the quantize kernel may be read here.
struct Prefetch {
  char const* weight;
  uint32_t weight_bytes_a_block;  // each block fetches its share, wherever its tiles are
  float const* vectors[2];        // the weight's scales and the bias
  int lines[2];                   // of 128 bytes

  Prefetch() = default;
  Prefetch(GemmProblem const& p, dim3 grid)
      : weight(static_cast<char const*>(p.rhs)),
        weight_bytes_a_block(0),
        vectors{p.rhs_scale, p.bias},
        lines{lines_of(p.per_channel ? p.n : 1), p.bias != nullptr ? lines_of(p.n) : 0} {
    if (p.dependent) {
      int64_t const bytes = std::min(int64_t{p.n} * p.k, kWeightBytes);
      int64_t const share = bytes / (int64_t{1} * grid.x * grid.y * grid.z);
      weight_bytes_a_block = static_cast<uint32_t>(share / 128 * 128);
    }
  }

  CUTLASS_DEVICE void operator()() const {
    int const thread = threadIdx.x, block = blockIdx.x + gridDim.x * blockIdx.y;
    int const blocks = gridDim.x * gridDim.y;
    if (thread == 0) {
      char const* const share = weight + int64_t{block} * weight_bytes_a_block;
      for (uint32_t at = 0; at < weight_bytes_a_block; at += kBytesAtOnce) {
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(share + at),
                     "r"(min(weight_bytes_a_block - at, kBytesAtOnce)));
      }
    } else if (thread >= 32 && thread < 96) {
      int const which = thread / 32 - 1;
      for (int line = block + thread % 32 * blocks; line < lines[which]; line += 32 * blocks) {
        asm volatile("prefetch.global.L2 [%0];" ::"l"(vectors[which] + line * kLine));
      }
    }
  }

 private:
  static constexpr int kLine = 32;  // floats
  static constexpr int64_t kWeightBytes = 4 << 20;
  static constexpr uint32_t kBytesAtOnce = 64 << 10;  // one instruction of megabytes is untried
  static int lines_of(int n) { return (n + kLine - 1) / kLine; }
};

}  // namespace jaxfp8
