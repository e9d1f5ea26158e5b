// Stores a staged subtile where TMA cannot address the rows of the result.
#pragma once

#include <numeric>

#include "cute/tensor.hpp"
#include "cutlass/epilogue/collective/collective_builder.hpp"

namespace jaxfp8 {

inline constexpr int kMaxClasses = 8;

// NOTES: TMA wants rows that start at multiples of 16 bytes; a bfloat16 row of 3420 features does
// not. Padding the rows and slicing them afterwards is one more kernel and one more pass over the
// result. So each subtile that the epilogue has staged in shared memory for TMA is also sent where
// it belongs, and CUTLASS's own TMA store gets a tensor of one element (gemm.cuh). One kernel
// serves both, told apart at run time. Two ways:
//
// By classes. Rows that are equal modulo `classes` = 16 / gcd(16, pitch in bytes) lie a multiple of
// 16 bytes apart, so each class is a tensor that TMA can address; the GEMM runs over classes as
// CUTLASS runs over a batch, x being quantized into that order. But a store by TMA must also begin
// at a column that is such a multiple and not negative (else: illegal instruction), and what it
// clips on the right it clips to such a multiple (else the next row's first features are
// overwritten). So where the rows of a class begin `shift` elements past a multiple, its tiles are
// `shift` features early (class_mainloop.cuh), its tensor has the whole 16 bytes within a row, and
// threads store the rest: the first subtile of a row, and up to 7 features at its end.
//
// By threads, where classes would waste tiles (few rows), and in swapped kernels: plain stores.
//
// Measured on an H200, 2026-11-22, 4096x3420x1280, us, without activation / with gelu: 3424
// features by TMA 36.0 / 46.5; 3424 by threads 40.1 / 53.0; 3420 by threads 41.4 / 53.8. So what
// costs is the threads' time, because the epilogue of a short K is as long as its mainloop; that
// rows begin within a 32-byte sector costs little.
template <class Element>
struct DirectStoreArguments {
  Element* out = nullptr;  // null: CUTLASS's own store writes everything
  int64_t pitch = 0;
  int rows = 0;                   // of all classes
  int classes = 1;                // 1: by threads
  int step = 0;                   // a class's shift is `step` times its number
  int first_row[kMaxClasses] = {};
  cute::TmaDescriptor tensor[kMaxClasses] = {};
};

// The subtile `staged`, whose first element belongs at [token, feature] of a result, or of a class
// of its rows, that has `tokens` and `features`.
template <class Element, bool kTransposed, class EpilogueTile, int kThreads>
struct DirectStore {
  static constexpr int kRows = cute::size<0>(EpilogueTile{});
  static constexpr int kColumns = cute::size<1>(EpilogueTile{});
  static constexpr int kTokens = kTransposed ? kColumns : kRows;
  static constexpr int kFeatures = kTransposed ? kRows : kColumns;

  // In the kernel's parameters, where TMA reads its descriptors.
  DirectStoreArguments<Element> const& to;
  Element const* staged;
  int tokens, features;
  int token, feature;
  int thread;

  // A subtile is staged in boxes of 128, 64 or 32 bytes a row, the widest that divide it, one
  // behind the other.
  static constexpr int kBox = std::gcd(kFeatures, 128 / static_cast<int>(sizeof(Element)));

  CUTLASS_DEVICE void by_class(int row_class, bool issues_tma) const {
    constexpr int kUnit = 16 / sizeof(Element);
    int const shift = row_class * to.step;
    int const before = shift == 0 ? 0 : kUnit - shift;  // features left of the class's tensor
    int const tail = features - (features - before) % kUnit;  // the first one right of it
    if (issues_tma && cute::elect_one_sync()) {
      CUTLASS_PRAGMA_UNROLL
      for (int f = 0; f < kFeatures; f += kBox) {
        if (feature + f < 0) continue;
        cute::SM90_TMA_STORE_3D::copy(&to.tensor[row_class], staged + f * kRows,
                                      feature + f - before, token, 0);
      }
    }
    if (feature < 0) {
      // 16 bytes at a time: the box begins at a multiple of them, `shift` before the row.
      constexpr int kUnits = kBox / kUnit, kTurns = kTokens * kUnits / kThreads;
      using Piece = cutlass::AlignedArray<Element, kUnit>;
      auto const tile = staged_tile();
      CUTLASS_PRAGMA_UNROLL
      for (int turn = 0; turn < kTurns; ++turn) {
        int const at = thread + turn * kThreads, t = at / kUnits, f = at % kUnits * kUnit;
        if (f > 0 && row(row_class, t) < to.rows) {
          *reinterpret_cast<Piece*>(place(row_class, t, f)) =
              *reinterpret_cast<Piece const*>(&tile(t, f));
        }
      }
      store_few(row_class, shift, kUnit);
    }
    if (features < feature + kFeatures && tail < features &&
        tail >= feature + kBox * (feature < 0)) {
      store_few(row_class, max(tail - feature, 0), features - feature);
    }
  }

  // Features from `first` to `last` of the subtile, element by element.
  CUTLASS_DEVICE void store_few(int row_class, int first, int last) const {
    auto const tile = staged_tile();
    CUTLASS_PRAGMA_NO_UNROLL
    for (int t = thread; t < kTokens && row(row_class, t) < to.rows; t += kThreads) {
      CUTLASS_PRAGMA_NO_UNROLL
      for (int f = first; f < last; ++f) *place(row_class, t, f) = tile(t, f);
    }
  }

  CUTLASS_DEVICE int row(int row_class, int t) const {
    return to.first_row[row_class] + (token + t) * to.classes;
  }

  CUTLASS_DEVICE Element* place(int row_class, int t, int f) const {
    return to.out + row(row_class, t) * to.pitch + feature + f;
  }

  CUTLASS_DEVICE void by_threads() const {
    if (to.pitch * sizeof(Element) % 8 == 0) {
      copy<8 / sizeof(Element)>();
    } else {
      copy<1>();
    }
  }

  // kPiece neighbouring features at a time; the pitch is a multiple of them, and so are all
  // coordinates.
  template <int kPiece>
  CUTLASS_DEVICE void copy() const {
    using Piece = cutlass::AlignedArray<Element, kPiece>;
    constexpr int kPieces = kFeatures / kPiece;
    constexpr int kStep = kThreads / kPieces;  // tokens from one turn to the next
    // Loads first, some at a time: unrolled whole in every subtile it made the epilogue so long
    // that small GEMMs, which wait for their instructions, were 0.3 us slower without using it.
    constexpr int kBatch = kTokens / kStep < 8 ? kTokens / kStep : 8;
    // Whether no thread and no turn is left over, so that there is less to ask.
    constexpr bool kEven = kThreads % kPieces == 0 && kTokens % (kStep * kBatch) == 0;
    auto const tile = staged_tile();
    int const f = thread % kPieces * kPiece;
    if (feature + f >= features || (!kEven && thread >= kStep * kPieces)) return;
    Element* const first = to.out + token * to.pitch + feature + f;
    CUTLASS_PRAGMA_NO_UNROLL
    for (int t = thread / kPieces; t < kTokens; t += kBatch * kStep) {
      Piece pieces[kBatch];
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kBatch; ++i) {
        int const row = kEven ? t + i * kStep : min(t + i * kStep, kTokens - 1);
        pieces[i] = *reinterpret_cast<Piece const*>(&(kTransposed ? tile(f, row) : tile(row, f)));
      }
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kBatch; ++i) {
        int const row = t + i * kStep;
        if (!kEven && row >= kTokens) break;
        if (token + row < tokens) *reinterpret_cast<Piece*>(first + row * to.pitch) = pieces[i];
      }
    }
  }

  // The staged subtile in CUTLASS's layout.
  CUTLASS_DEVICE auto staged_tile() const {
    using Stride = cute::conditional_t<kTransposed, cute::Stride<cute::_1, int64_t, cute::_0>,
                                       cute::Stride<int64_t, cute::_1, cute::_0>>;
    using Atom = decltype(cutlass::epilogue::collective::detail::
                              sm90_get_epilogue_smem_swizzle_layout_atom<Stride, Element,
                                                                         EpilogueTile>());
    using Order = cute::conditional_t<kTransposed, cute::Step<cute::_2, cute::_1>,
                                      cute::Step<cute::_1, cute::_2>>;
    using Shape = cute::Shape<cute::Int<kRows>, cute::Int<kColumns>>;
    return cute::as_position_independent_swizzle_tensor(cute::make_tensor(
        cute::make_smem_ptr(staged), cute::tile_to_shape(Atom{}, Shape{}, Order{})));
  }
};

}  // namespace jaxfp8
