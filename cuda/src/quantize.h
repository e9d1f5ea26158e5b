// The host face of the quantize kernel.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "row_classes.h"

namespace jaxfp8 {

enum class In : int { kBF16 = 0, kF16 = 1, kF32 = 2, kCount = 3 };

// q[i, :k] = saturate(x[i, :] / scale[i]), q[i, k:k_pad] = 0, scale[i] = max|x[i, :]| / 448
struct QuantizeProblem {
  int m, k, k_pad;
  void const* x;         // [m, k]
  In in;
  float const* x_scale;  // one static scale, or null: one for each row
  void* q;               // e4m3 [m, k_pad]
  float* scale;          // [m]; written in either case
  bool lets_next_start;  // a dependent kernel may take its place as soon as all blocks have begun
  RowClasses classes;    // with several, q is [classes, rows of the largest, k_pad], scale likewise
  cudaStream_t stream;
};

// On the current device, where the first call also loads the kernels. Null, or why it failed.
char const* quantize_launch(QuantizeProblem const& problem);

}  // namespace jaxfp8
