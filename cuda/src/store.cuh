// Sends a staged piece of the result to where it belongs.
#pragma once

#include <algorithm>

#include "cute/tensor.hpp"
#include "cutlass/array.h"
#include "row_classes.h"

namespace jaxfp8 {

// Where the results of a GEMM go, and how. TMA wants rows that start at multiples of 16 bytes; a
// bfloat16 row of 3420 features does not. Padding the rows and slicing them afterwards is one more
// kernel and one more pass over the result. So there are three ways, told apart at run time:
//
// By TMA, where it can address the rows.
//
// By classes. Rows that are equal modulo `classes` = 32 / gcd(32, pitch in bytes) lie a multiple of
// 32 bytes apart, so each class is a tensor that TMA can address; the GEMM runs over classes as
// over a batch, x being quantized into that order. But a store by TMA must also begin at a column
// that is a multiple of 16 bytes and not negative (else: illegal instruction), and what it clips
// on the right it clips to such a multiple (else the next row's first features are overwritten).
// So where the rows of a class begin `shift` elements past a multiple of 32 bytes, its tiles are
// `shift` features early (class_mainloop.cuh), its tensor has the whole 16 bytes within a row, and
// threads store the rest: the first box of a row, and up to 7 features at its end. 16 bytes would
// do for TMA, and do where 32 make more than 8 classes or waste tiles.
//
// By threads, where classes would waste tiles (few rows), and in swapped kernels: plain stores.
template <class Element>
struct Destination {
  Element* out = nullptr;
  int64_t pitch = 0;
  int rows = 0;      // of all classes
  int tokens = 0;    // rows of a class
  int features = 0;
  bool by_tma = false;
  int classes = 1;
  int step = 0;      // a class's shift is `step` times its number
  int first_row[kMaxClasses] = {};
  cute::TmaDescriptor tensor[kMaxClasses] = {};  // of each class, if by TMA
};

// The piece `staged`, whose first element belongs at [token, feature] of the result, or of a class
// of its rows. By the 128 threads of a warpgroup.
template <class Element, class Staging>
struct Store {
  static constexpr int kThreads = 128;
  static constexpr int kTokens = Staging::kTokens, kFeatures = Staging::kFeatures;
  static constexpr int kBox = Staging::kBox;
  static constexpr int kUnit = 16 / sizeof(Element);

  // The largest that is at most `most`.
  static constexpr int power_of_two(int most) {
    int power = 1;
    while (2 * power <= most) power *= 2;
    return power;
  }

  // In the kernel's parameters, where TMA reads its descriptors.
  Destination<Element> const& to;
  char const* staged;
  int token, feature, row_class;
  int thread;

  // Rows of the result: where the piece's first one begins, how far it is from one to the next, and
  // how many of the piece's there are.
  struct Rows {
    Element* out;
    int64_t pitch;
    int count;
  };

  CUTLASS_DEVICE void operator()() const {
    if (to.by_tma) {
      int const before = to.classes > 1 ? left_of_tensor() : 0;
      if (thread == 0) by_tma(before);
      if (to.classes > 1) edges_of_class(before);
    } else if constexpr (sizeof(Element) > 1) {  // rows of e4m3 are padded
      by_threads();
    }
  }

  // NOTES: by one thread, not elect.sync: with that in the loop over tiles ptxas no longer kept the
  // descriptors of promoted MMAs in uniform registers (108 moves among 768 instructions), and
  // 512x4096x14336 took 4 % longer. Boxes outside of the result are left out, as TMA takes its time
  // for them too: two beside two cost 700 clocks a piece (H200, 2026-11-30).
  CUTLASS_DEVICE void by_tma(int before) const {
    CUTLASS_PRAGMA_UNROLL
    for (int f = 0; f < kFeatures; f += kBox) {
      if (feature + f < 0 || feature + f >= to.features) continue;
      cute::SM90_TMA_STORE_2D::copy(&to.tensor[row_class], staged + f * kTokens * sizeof(Element),
                                    feature + f - before, token);
    }
  }

  CUTLASS_DEVICE int shift() const { return row_class * to.step; }

  CUTLASS_DEVICE int left_of_tensor() const {
    return shift() == 0 ? 0 : to.classes * to.step - shift();
  }

  CUTLASS_DEVICE void edges_of_class(int before) const {
    int const tail = to.features - (to.features - before) % kUnit;  // the first feature right of it
    bool const has_tail = to.features < feature + kFeatures && tail < to.features &&
                          tail >= feature + kBox * (feature < 0);
    if (feature >= 0 && !has_tail) return;
    int const first = to.first_row[row_class] + token * to.classes;
    Rows const rows{to.out + first * to.pitch + feature, to.pitch * to.classes,
                    (to.rows - first + to.classes - 1) / to.classes};
    if (feature < 0) {
      // 16 bytes at a time: the box begins at a multiple of them, `shift` before the row.
      using Piece = cutlass::AlignedArray<Element, kUnit>;
      constexpr int kPieces = power_of_two(kBox / kUnit);
      for (int f = thread % kPieces * kUnit; f < kBox; f += kPieces * kUnit) {
        if (f >= shift()) copy<Piece, kPieces>(rows, f);
      }
      if (shift() % kUnit != 0) copy_few(rows, shift(), (shift() / kUnit + 1) * kUnit);
    }
    if (has_tail) copy_few(rows, max(tail - feature, 0), to.features - feature);
  }

  CUTLASS_DEVICE void by_threads() const {
    Rows const rows{to.out + token * to.pitch + feature, to.pitch, to.tokens - token};
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
    constexpr int kPieces = power_of_two(std::min(kBox / kPiece, 16));  // copied together of a row
    CUTLASS_PRAGMA_NO_UNROLL
    for (int f = thread % kPieces * kPiece; f < kFeatures; f += kPieces * kPiece) {
      if (feature + f < to.features) {
        copy<cutlass::AlignedArray<Element, kPiece>, kPieces>(rows, f);
      }
    }
  }

  // Features from `first` to `last` of the piece, less than 16 bytes of each row.
  CUTLASS_DEVICE void copy_few(Rows const& rows, int first, int last) const {
    int const f = first + thread % kUnit;
    if (f < last) copy<Element, kUnit>(rows, f);
  }

  // Of each row one piece at feature f, where `kPieces` threads have a row between them.
  //
  // NOTES: the staged layout repeats every 8 rows, so a thread whose rows are a multiple of that
  // apart finds its pieces at constant distances. With the layout asked for each of them, about 28
  // instructions a piece, a tile of 128x128 took 2900 clocks longer so than by TMA (H200,
  // 2026-11-30). Loads first, some at a time: unrolled whole in every piece it made the epilogue
  // so long that small GEMMs, which wait for their instructions, were 0.3 us slower without using
  // it.
  template <class Piece, int kPieces>
  CUTLASS_DEVICE void copy(Rows const& rows, int f) const {
    constexpr int kApart = kThreads / kPieces;  // rows
    constexpr int kTurns = std::max(kTokens / kApart, 1), kBatch = std::min(kTurns, 8);
    static_assert(kApart % 8 == 0 && kTurns % kBatch == 0);
    int const first = thread / kPieces, count = min(rows.count, kTokens);
    char const* from = staged + Staging::at(first, f);
    Element* out = rows.out + first * rows.pitch + f;
    CUTLASS_PRAGMA_NO_UNROLL
    for (int t = first; t < count; t += kBatch * kApart) {
      Piece pieces[kBatch];
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kBatch; ++i) {
        pieces[i] = *reinterpret_cast<Piece const*>(from + i * kApart * Staging::kRowBytes);
      }
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kBatch; ++i) {
        if (t + i * kApart < count) {
          *reinterpret_cast<Piece*>(out + i * kApart * rows.pitch) = pieces[i];
        }
      }
      from += kBatch * kApart * Staging::kRowBytes;
      out += kBatch * kApart * rows.pitch;
    }
  }
};

}  // namespace jaxfp8
