// Stores a staged subtile where TMA cannot address the rows of the result.
#pragma once

#include <algorithm>
#include <numeric>

#include "cute/tensor.hpp"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "row_classes.h"

namespace jaxfp8 {

// NOTES: TMA wants rows that start at multiples of 16 bytes; a bfloat16 row of 3420 features does
// not. Padding the rows and slicing them afterwards is one more kernel and one more pass over the
// result. So each subtile that the epilogue has staged in shared memory for TMA is also sent where
// it belongs, and CUTLASS's own TMA store gets a tensor of one element (gemm.cuh). One kernel
// serves both, told apart at run time. Two ways:
//
// By classes. Rows that are equal modulo `classes` = 32 / gcd(32, pitch in bytes) lie a multiple of
// 32 bytes apart, so each class is a tensor that TMA can address; the GEMM runs over classes as
// CUTLASS runs over a batch, x being quantized into that order. But a store by TMA must also begin
// at a column that is a multiple of 16 bytes and not negative (else: illegal instruction), and what
// it clips on the right it clips to such a multiple (else the next row's first features are
// overwritten). So where the rows of a class begin `shift` elements past a multiple of 32 bytes, its
// tiles are `shift` features early (class_mainloop.cuh), its tensor has the whole 16 bytes within a
// row, and threads store the rest: the first subtile of a row, and up to 7 features at its end. 16
// bytes would do for TMA, and do where 32 make more than 8 classes or waste tiles.
//
// By threads, where classes would waste tiles (few rows), and in swapped kernels: plain stores.
//
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

  static constexpr int kUnit = 16 / sizeof(Element);

  // Rows of the result: where the subtile's first one begins, how far it is from one to the next,
  // and how many of the subtile's there are.
  struct Rows {
    Element* out;
    int64_t pitch;
    int count;
  };

  CUTLASS_DEVICE void by_class(int row_class, bool issues_tma) const {
    int const shift = row_class * to.step;
    int const before = shift == 0 ? 0 : to.classes * to.step - shift;  // left of the class's tensor
    int const tail = features - (features - before) % kUnit;  // the first feature right of it
    if (issues_tma && cute::elect_one_sync()) {
      CUTLASS_PRAGMA_UNROLL
      for (int f = 0; f < kFeatures; f += kBox) {
        if (feature + f < 0) continue;
        cute::SM90_TMA_STORE_3D::copy(&to.tensor[row_class], staged + f * kRows,
                                      feature + f - before, token, 0);
      }
    }
    bool const has_tail = features < feature + kFeatures && tail < features &&
                          tail >= feature + kBox * (feature < 0);
    if (feature >= 0 && !has_tail) return;
    int const first = to.first_row[row_class] + token * to.classes;
    Rows const rows{to.out + first * to.pitch + feature, to.pitch * to.classes,
                    (to.rows - first + to.classes - 1) / to.classes};
    if (feature < 0) {
      // 16 bytes at a time: the box begins at a multiple of them, `shift` before the row.
      using Piece = cutlass::AlignedArray<Element, kUnit>;
      constexpr int kPieces = kBox / kUnit;
      int const f = thread % kPieces * kUnit;
      if (f >= shift) copy<Piece, kPieces>(rows, f);
      if (shift % kUnit != 0) copy_few(rows, shift, (shift / kUnit + 1) * kUnit);
    }
    if (has_tail) copy_few(rows, max(tail - feature, 0), features - feature);
  }

  CUTLASS_DEVICE void by_threads() const {
    Rows const rows{to.out + token * to.pitch + feature, to.pitch, tokens - token};
    if (to.pitch * sizeof(Element) % 8 == 0) {
      copy_all<8 / sizeof(Element)>(rows);
    } else {
      copy_all<1>(rows);
    }
  }

  // kPiece neighbouring features at a time; the pitch is a multiple of them, and so are all
  // coordinates.
  template <int kPiece>
  CUTLASS_DEVICE void copy_all(Rows const& rows) const {
    constexpr int kPieces = std::min(kBox / kPiece, 16);  // of a row that are copied together
    CUTLASS_PRAGMA_NO_UNROLL
    for (int f = thread % kPieces * kPiece; f < kFeatures; f += kPieces * kPiece) {
      if (feature + f < features) {
        copy<cutlass::AlignedArray<Element, kPiece>, kPieces>(rows, f);
      }
    }
  }

  // Features from `first` to `last` of the subtile, less than 16 bytes of each row.
  CUTLASS_DEVICE void copy_few(Rows const& rows, int first, int last) const {
    int const f = first + thread % kUnit;
    if (f < last) copy<Element, kUnit>(rows, f);
  }

  // Of each row one piece at feature f, where `kPieces` threads have a row between them.
  //
  // NOTES: the staged layout repeats every 8 rows, so a thread whose rows are a multiple of that
  // apart finds its pieces at constant distances. With the layout asked for each of them, about 28
  // instructions a piece, a tile of 128x128 took 2900 clocks longer so than by TMA (H200, 2026-11-30).
  // Loads first, some at a time: unrolled whole in every subtile it made the epilogue so long that
  // small GEMMs, which wait for their instructions, were 0.3 us slower without using it.
  template <class Piece, int kPieces>
  CUTLASS_DEVICE void copy(Rows const& rows, int f) const {
    constexpr int kApart = kThreads / kPieces;  // rows
    constexpr int kTurns = std::max(kTokens / kApart, 1), kBatch = std::min(kTurns, 8);
    static_assert(kApart % 8 == 0 && kTurns % kBatch == 0);
    int const first = thread / kPieces, count = min(rows.count, kTokens);
    auto const tile = staged_tile();
    Element const* from = &(kTransposed ? tile(f, first) : tile(first, f));
    Element* out = rows.out + first * rows.pitch + f;
    CUTLASS_PRAGMA_NO_UNROLL
    for (int t = first; t < count; t += kBatch * kApart) {
      Piece pieces[kBatch];
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kBatch; ++i) {
        pieces[i] = *reinterpret_cast<Piece const*>(from + i * kApart * kBox);
      }
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kBatch; ++i) {
        if (t + i * kApart < count) {
          *reinterpret_cast<Piece*>(out + i * kApart * rows.pitch) = pieces[i];
        }
      }
      from += kBatch * kApart * kBox;
      out += kBatch * kApart * rows.pitch;
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
