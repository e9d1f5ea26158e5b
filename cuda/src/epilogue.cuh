// The epilogue: out = activation(lhs_scale * (rhs_scale * acc) + bias) + residual, in float32,
// rounded once.
#pragma once

#include <algorithm>

#include "elementwise.cuh"
#include "gemm.h"
#include "residual.cuh"
#include "staging.cuh"
#include "store.cuh"

namespace jaxfp8 {

// What a warpgroup does with its sums of a tile: piece by piece, of 64 rows each, they are scaled,
// rounded, staged in shared memory and sent. Each warpgroup has memory of its own here, and none
// waits for another.
//
// NOTES: CUTLASS's epilogue reads its vectors one after another, each waiting for memory while the
// GEMM is already done. Here they are asked for together, before the GEMM begins (fetch). With
// CUTLASS's nodes a 512x4096x256 GEMM took 5.0 us without an epilogue and 6.0 (swapped 6.5) with it
// (H200, 2026-11-22). With CUTLASS's store around them, Cooperative warpgroups met twice for each
// part of a tile and Pingpong ones waited until TMA had read the other's: promoted 256x128 takes
// 0.98 to 0.99 of its time so, Pingpong 128x128 at K = 1280 0.95 to 1.01, with gelu 0.93 to 0.96
// (in turn, H200, 2026-11-30, as the next figures).
// Tried, of no use: what a warp has staged sent by itself, without a barrier (Pingpong 128x128 with
// 4096x3424x1280 1.03 of the time); vectors staged before the MMAs (1.04).
template <class Tile, class Element, Operands kOperands, Schedule kSchedule, bool kHasResidual>
struct Epilogue {
  static constexpr bool kResidual = kHasResidual;
  static constexpr bool kSwapped = kOperands == Operands::kSwapped;
  static constexpr bool kPingpong = kSchedule == Schedule::kPingpong;
  static constexpr int kGroups = 2;                              // warpgroups of a kernel
  static constexpr int kTogether = kPingpong ? 1 : kGroups;      // of a tile
  static constexpr int kThreads = 128;                           // of a warpgroup
  static constexpr int kColumns = cute::size<1>(Tile{});
  static constexpr int kBlocks = cute::size<0>(Tile{}) / (64 * kTogether);

  // Into how many pieces 64 rows are cut.
  //
  // NOTES: each costs a meeting and a fence. Cooperative 128x128 takes 1.02 of its time in pieces
  // of 64 columns, Pingpong 128x128 with 4096x3424x1280 1.05. But of 160 columns two Pingpong
  // warpgroups' pieces would take a stage from the loads.
  static constexpr int kParts = [] {
    int const row = kColumns * static_cast<int>(sizeof(Element));
    int const most = kPingpong && kBlocks > 1 ? 256 : 384;  // bytes of a row
    int parts = 1;
    while (row > parts * most || kColumns % (8 * parts) != 0) ++parts;
    return parts;
  }();
  static constexpr int kPieceColumns = kColumns / kParts;
  static constexpr int kPieces = kBlocks * kParts;
  using Staged = Staging<Element, kSwapped, kPieceColumns>;

  // NOTES: promoted 256x128 has a stage more with one, and takes 0.99 of the time so. Pingpong
  // warpgroups finish beside MMAs that take no longer where K is small: they should not wait for
  // TMA.
  static constexpr int kBuffers = kPingpong ? std::min(kPieces, 2) : 1;
  static constexpr int kUses = kPieces / kBuffers;  // of each, for a tile
  static_assert(kPieces % kBuffers == 0);

  // Vectors along a tile's rows are in registers, those along its columns in shared memory: two
  // neighbours of each, as a thread wants them.
  static constexpr int kRowVectors = kSwapped ? 2 : 1, kColumnVectors = 3 - kRowVectors;

  struct Results {
    char staged[kGroups][kBuffers][Staged::kBytes];
    alignas(16) float columns[kGroups][kColumns / 2][kColumnVectors][2];
  };
  struct ResultsAndResiduals : Results {
    typename Residual<Element, Staged>::Barrier arrived[kGroups][kBuffers];
  };
  using Storage = cute::conditional_t<kResidual, ResultsAndResiduals, Results>;

  struct Params {
    float const* lhs_scale = nullptr;  // [tokens] if per_token, [classes, tokens] with classes
    float const* rhs_scale = nullptr;  // [features] if per_channel
    float const* bias = nullptr;       // [bias_features], or null
    bool per_token = false, per_channel = false;
    int bias_features = 0;
    Activation activation = Activation::kNone;
    bool float16 = false;              // of 16 bits: float16, not bfloat16
    float const* out_scale = nullptr;  // one value, for e4m3
    cute::conditional_t<kResidual, cute::TmaDescriptor, cute::tuple<>> residual = {};
    Destination<Element> to;
  };

  // Two, behind those of the kernel.
  static constexpr uint32_t kBarrier = 3;

  Params const& params;
  Storage& shared;
  int group;   // of the two warpgroups
  int thread;  // of the warpgroup

  CUTLASS_DEVICE void meet() const {
    cutlass::arch::NamedBarrier::sync(kThreads, kBarrier + group);
  }

  // By a warp, before they are wanted.
  static CUTLASS_DEVICE void prefetch_descriptors(Params const& params) {
    int const row_class = threadIdx.x % 32;
    if (params.to.by_tma && row_class < params.to.classes) {
      cute::prefetch_tma_descriptor(&params.to.tensor[row_class]);
    }
  }

  // Where a tile of the result, or of a class of its rows, begins. The feature may be negative.
  struct Place {
    int token, feature, row_class;
  };

  template <class Coordinates>
  CUTLASS_DEVICE Place place(Coordinates const& coordinates) const {
    auto const [m, n, k, l] = coordinates;
    int const row = m * cute::size<0>(Tile{}), column = n * kColumns;
    return {kSwapped ? column : row, (kSwapped ? row : column) - l * params.to.step, l};
  }

  // A thread's vectors of its rows, and its share of those of the columns, on their way.
  struct Fetched {
    static constexpr int kTurns = (kColumns + kThreads - 1) / kThreads;
    float rows[kBlocks][2][kRowVectors];
    float columns[kTurns][kColumnVectors];
  };

  CUTLASS_DEVICE Fetched fetch(Place const& at) const {
    Fetched fetched;
    auto const of_token = [&](int t, float* to) {
      int const place_of_t = params.per_token ? at.row_class * params.to.tokens + t : 0;
      to[0] = t < params.to.tokens ? params.lhs_scale[place_of_t] : 0.f;
    };
    auto const of_feature = [&](int f, float* to) {
      bool const inside = f >= 0 && f < params.to.features;
      to[0] = inside ? params.rhs_scale[params.per_channel ? f : 0] : 0.f;
      to[1] = f >= 0 && f < params.bias_features ? params.bias[f] : 0.f;
    };
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < fetched.kTurns; ++i) {
      int const column = thread + i * kThreads;
      if constexpr (kSwapped) {
        of_token(at.token + column, fetched.columns[i]);
      } else {
        of_feature(at.feature + column, fetched.columns[i]);
      }
    }
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 2 * kBlocks; ++i) {
      int const row = first_row(i / 2) + thread / 32 * 16 + thread % 32 / 4 + i % 2 * 8;
      if constexpr (kSwapped) {
        of_feature(at.feature + row, fetched.rows[i / 2][i % 2]);
      } else {
        of_token(at.token + row, fetched.rows[i / 2][i % 2]);
      }
    }
    return fetched;
  }

  // Of the tile, where a block of this warpgroup's begins.
  CUTLASS_DEVICE int first_row(int block) const {
    return kPingpong ? block * 64 : (block * kTogether + group) * 64;
  }

  // Puts the columns' vectors where the warpgroup reads them.
  CUTLASS_DEVICE void stage(Fetched const& fetched) const {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < fetched.kTurns; ++i) {
      int const column = thread + i * kThreads;
      CUTLASS_PRAGMA_UNROLL
      for (int v = 0; v < kColumnVectors; ++v) {
        if (column < kColumns) {
          shared.columns[group][column / 2][v][column % 2] = fetched.columns[i][v];
        }
      }
    }
    wait_until_read<0>();
    meet();
  }

  // The memory that was sent last but `kLeft` times may be written: for the thread that sent it.
  template <int kLeft>
  CUTLASS_DEVICE void wait_until_read() const {
    if (thread == 0) cute::tma_store_wait<kLeft>();
  }

  // `tile`: how many this warpgroup has stored.
  template <class Sums>
  CUTLASS_DEVICE void store(Sums const& sums, Fetched const& fetched, Place const& at,
                            int tile) const {
    static_assert(decltype(cute::size<1>(sums))::value == kBlocks &&
                  decltype(cute::size<2>(sums))::value == 1);
    CUTLASS_PRAGMA_UNROLL
    for (int piece = 0; piece < kPieces; ++piece) {
      auto const to = where(piece, at);
      auto z = scaled(sums, fetched, piece);
      activate(z, params.activation);
      if constexpr (kResidual) {
        shared.arrived[group][piece % kBuffers].wait((tile * kUses + piece / kBuffers) % 2);
        Staged::add(to.staged, z, thread, params.float16);
      }
      auto const results = rounded(z);
      if (piece >= kBuffers && !kResidual) {
        wait_until_read<kBuffers - 1>();
        meet();
      }
      Staged::put(to.staged, results, thread);
      cute::tma_store_fence();
      meet();
      Store<Element, Staged>{params.to, to.staged, to.token, to.feature, at.row_class, thread}();
      if (thread == 0) cute::tma_store_arrive();
      if constexpr (kResidual) {
        if (piece + kBuffers < kPieces) ask_for_residual_of(piece + kBuffers, at);
      }
    }
  }

  // Asks for the residual of the pieces that have memory before any is stored. The warpgroup meets
  // (stage) before it waits at the barriers that are made here for its first tile.
  CUTLASS_DEVICE void ask_for_residual(Place const& at, int tile) const {
    if (tile == 0) {
      if (thread == 0) {
        for (auto& barrier : shared.arrived[group]) barrier.init(1);
        cutlass::arch::fence_barrier_init();
      }
      __syncwarp();  // SASS has another thread of the warp make them (racecheck saw it)
    }
    CUTLASS_PRAGMA_NO_UNROLL
    for (int piece = 0; piece < kBuffers; ++piece) ask_for_residual_of(piece, at);
  }

  CUTLASS_DEVICE void ask_for_residual_of(int piece, Place const& at) const {
    if (thread != 0) return;
    wait_until_read<0>();
    auto const to = where(piece, at);
    Residual<Element, Staged>{params.residual, shared.arrived[group][piece % kBuffers]}.ask(
        to.staged, to.token, to.feature, params.to.features);
  }

  // Where a piece is staged, and where it belongs.
  struct Piece {
    char* staged;
    int token, feature;
  };

  CUTLASS_DEVICE Piece where(int piece, Place const& at) const {
    int const row = first_row(piece / kParts), column = first_column(piece);
    return {shared.staged[group][piece % kBuffers], at.token + (kSwapped ? column : row),
            at.feature + (kSwapped ? row : column)};
  }

  static CUTLASS_DEVICE int first_column(int piece) { return piece % kParts * kPieceColumns; }

  // A piece's sums, scaled, and the bias.
  template <class Sums>
  CUTLASS_DEVICE auto scaled(Sums const& sums, Fetched const& fetched, int piece) const {
    int const block = piece / kParts, column = first_column(piece);
    typename Staged::Values z;
    CUTLASS_PRAGMA_UNROLL
    for (int j = 0; j < kPieceColumns / 8; ++j) {
      using Pairs = cutlass::AlignedArray<float, 2 * kColumnVectors>;
      auto const along =
          reinterpret_cast<Pairs const&>(shared.columns[group][column / 2 + j * 4 + thread % 4]);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 4; ++i) {
        float const* const row = fetched.rows[block][i / 2];
        float const sum = sums(column / 2 + j * 4 + i, block, 0);
        z[j * 4 + i] = kSwapped ? fmaf(along[i % 2], row[0] * sum, row[kRowVectors - 1])
                                : fmaf(row[0], along[i % 2] * sum,
                                       along[2 * (kColumnVectors - 1) + i % 2]);
      }
    }
    return z;
  }

  // A piece's results, as they are staged.
  CUTLASS_DEVICE auto rounded(typename Staged::Values& z) const {
    if constexpr (sizeof(Element) == 2) {
      return rounded_to_16_bits(z, params.float16);
    } else {
      // Not __ldg: with dependent launch the kernel before may have written it after this one
      // began.
      if constexpr (sizeof(Element) == 1) divide(z, *params.out_scale);
      return z;
    }
  }
};

}  // namespace jaxfp8
