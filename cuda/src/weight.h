// The host face of the kernels that write a loaded weight.
#pragma once

#include <cuda_runtime_api.h>

#include "quantize.h"

namespace jaxfp8 {

constexpr int kMaxWeights = 32;

// Several weights of one shape. Of each, scale[:, :n] = max|w| / 448 of each output feature, unless
// it is given; then q[:, :n, :k] = saturate(w / scale), with 0 in the padding, where the scale is 1.
struct WeightProblem {
  int count, stack, n, k, n_pad, k_pad;
  In in;
  bool in_out;                  // w is [stack, k, n], else [stack, n, k]
  void const* w[kMaxWeights];
  float const* given;           // [count, stack, n]; null: measure
  float* measured;              // [count, stack, n], and nothing else is written; or null
  void* q[kMaxWeights];         // e4m3 [stack, n_pad, k_pad]
  float* scale[kMaxWeights];    // [stack, n_pad]
  cudaStream_t stream;
};

// On the current device, where the first call also loads the kernels. Null, or why it failed.
char const* weight_launch(WeightProblem const& problem);

}  // namespace jaxfp8
