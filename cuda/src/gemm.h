// The host face of the GEMM: what a launch needs, and where each kernel is found.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <initializer_list>

#include "kernels.h"
#include "row_classes.h"

namespace jaxfp8 {

// The order is that of ACTIVATIONS in jaxfp8/_xla.py.
enum class Activation : int { kNone = 0, kRelu = 1, kGelu = 2, kSilu = 3, kCount = 4 };

enum class Out : int { kBF16 = 0, kF16 = 1, kF32 = 2, kE4M3 = 3, kCount = 4 };

// What a kernel is compiled for. bfloat16 and float16 differ in one conversion, which is chosen
// when it runs: two of six kinds less for one uniform branch. A residual is not: jumps over what it
// needs cost promoted kernels without one 0 to 3 % (H200, in turn, 2026-12-01).
enum class Stored : int { k16Bits = 0, kF32 = 1, kE4M3 = 2, k16BitSum = 3, kCount = 4 };

constexpr Stored stored(Out out, bool residual) {
  if (residual) return Stored::k16BitSum;
  return out == Out::kF32 ? Stored::kF32 : out == Out::kE4M3 ? Stored::kE4M3 : Stored::k16Bits;
}

constexpr int bytes_of(Out out) { return out == Out::kF32 ? 4 : out == Out::kE4M3 ? 1 : 2; }

// out[m, n] = activation(lhs_scale * rhs_scale * sum_k lhs[m, k] rhs[n, k] + bias[n])
// + residual[m, n], divided by out_scale where out is e4m3
struct GemmProblem {
  int m, n, k;         // k is padded; n is what is written, at most the rows of rhs
  int64_t out_pitch;   // elements from one row of out to the next; any, not only 16 bytes' multiple
  void const* lhs;     // e4m3 [m, k]
  int lhs_rows;        // rows that lhs has in memory, m or more: those behind m are read, not used
  void const* rhs;     // e4m3 [>= n, k]
  float const* lhs_scale;
  bool per_token;      // lhs_scale is [m], else one value
  RowClasses classes;  // with several, lhs and lhs_scale are [classes, rows of the largest, ...]
  float const* rhs_scale;
  bool per_channel;    // rhs_scale is [>= n], else one value
  float const* bias;   // [bias_features], or null
  int bias_features;   // n, or less: 0 from there on
  void* out;           // [m, out_pitch]
  Out out_type;
  float const* out_scale;  // one value, read if out is e4m3
  void const* residual;  // [m, out_pitch] of out's type, if that has 16 bits and a row a multiple
                         // of 16 bytes; or null
  Activation activation;
  int sm_count;
  bool dependent;      // start while the kernel before on the stream still runs, and wait inside
  cudaStream_t stream;
};

// Rows that a class within 32 bytes has at least.
inline constexpr int kRowsOfASectorClass = 512;

// The classes a result's rows are best stored in: one where TMA can address its rows, or where
// several would need more tiles. Rows of a class start at the same place within 32 bytes if 8
// classes are enough for that and each has enough rows, else within the 16 that TMA wants: stores
// of whole sectors are faster (store.cuh), but a class has a tile at its edge that is slower: 3420
// features for 2048 rows take 23.3 us in four classes and 23.6 in two, for 1024 13.3 and 13.1
// (128x128, gelu, K = 1280; H200, 2026-11-30).
constexpr RowClasses row_classes(Kernel kernel, Out out, int m, int64_t out_pitch) {
  KernelSpec const& spec = spec_of(kernel);
  int const span = spec.tile_m * spec.cluster_m;
  auto const clusters = [&](int rows) { return (rows + span - 1) / span; };
  bool const by_tma = out_pitch * bytes_of(out) % 16 == 0;
  if (by_tma || spec.operands == Operands::kSwapped || out_pitch <= spec.tile_n) return {};
  for (int bytes : {32, 16}) {
    RowClasses const classes = RowClasses::of(out_pitch, bytes / bytes_of(out));
    bool const cheap = 8 * classes.count * clusters(classes.rows(m)) <= 9 * clusters(m);
    bool const has_rows = classes.rows(m) >= (bytes == 32 ? kRowsOfASectorClass : 1);
    // Of the rows that begin furthest from the next unit, whole 16 bytes are left for TMA.
    bool const has_whole = out_pitch >= classes.unit() - classes.step + 16 / bytes_of(out);
    if (classes.count <= kMaxClasses && m >= classes.count && has_rows && has_whole && cheap) {
      return classes;
    }
  }
  return {};
}

// A row of 18 that begins 2 past a multiple of 16 elements has 4 from the next one on, which no TMA
// tensor can be.
static_assert(row_classes(Kernel::fast_pp_64x16x256_1x4, Out::kBF16, 4096, 18).unit() == 8);

// What a compiled instance offers. Each returns null, or why it failed.
struct GemmFunctions {
  char const* (*prepare)();
  char const* (*launch)(GemmProblem const&);
};

// On the current device, where the first call also loads the kernel. Null, or why it failed.
char const* gemm_launch(Kernel kernel, GemmProblem const& problem);

}  // namespace jaxfp8
