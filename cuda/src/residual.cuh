// Brings a piece of what is added to a result to where that will be staged.
#pragma once

#include "cute/arch/copy_sm90_tma.hpp"
#include "cutlass/arch/barrier.h"

namespace jaxfp8 {

// Of a product's residual, what belongs where a piece of the result does. It is asked for before
// the product's MMAs where the piece has memory then, and awaited when its sums are done.
//
// NOTES: by TMA alone, so rows begin at multiples of 16 bytes; others, and float32, are added by
// XLA (jaxfp8/_cutlass.py): threads that load them are slower, and the widths are ones that a model
// seldom has. Asked for where the MMAs begin, and not before the warpgroup's turn, 4096x3424x1280
// takes 37 us with it and not 40; asked for when a piece's sums are done a residual costs
// 1024x4096x14336 5.0 us, so 1.2 to 1.8. A kernel that adds it takes 6.8 (H200, 2026-12-01).
template <class Element, class Staging>
struct Residual {
  using Barrier = cutlass::arch::ClusterTransactionBarrier;

  cute::TmaDescriptor const& tensor;  // in the kernel's parameters, where TMA reads it
  Barrier& arrived;

  // By one thread, for whom `staged` must be free. What lies outside of the result is left out or
  // zero.
  CUTLASS_DEVICE void ask(char* staged, int token, int feature, int features) const {
    constexpr int kBoxBytes = Staging::kTokens * Staging::kRowBytes;
    int const inside = min(features - feature, Staging::kFeatures);
    int const boxes = max((inside + Staging::kBox - 1) / Staging::kBox, 0);
    arrived.arrive_and_expect_tx(boxes * kBoxBytes);
    CUTLASS_PRAGMA_NO_UNROLL
    for (int i = 0; i < boxes; ++i) {
      cute::SM90_TMA_LOAD_2D::copy(
          &tensor, reinterpret_cast<uint64_t*>(&arrived),
          static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL), staged + i * kBoxBytes,
          feature + i * Staging::kBox, token);
    }
  }
};

}  // namespace jaxfp8
