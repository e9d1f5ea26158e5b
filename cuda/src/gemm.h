// The host face of the GEMM: what a launch needs, and where each kernel is found.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels.h"

namespace jaxfp8 {

// The order is that of ACTIVATIONS in jaxfp8/_xla.py.
enum class Activation : int { kNone = 0, kRelu = 1, kGelu = 2, kSilu = 3, kCount = 4 };

enum class Out : int { kBF16 = 0, kF16 = 1, kF32 = 2, kCount = 3 };

// out[m, n] = activation(lhs_scale * rhs_scale * sum_k lhs[m, k] rhs[n, k] + bias[n])
struct GemmProblem {
  int m, n, k;         // k is padded; n is what is written, at most the rows of rhs
  int64_t out_pitch;   // elements from one row of out to the next; any, not only 16 bytes' multiple
  void const* lhs;     // e4m3 [m, k]
  void const* rhs;     // e4m3 [>= n, k]
  float const* lhs_scale;
  bool per_token;      // lhs_scale is [m], else one value
  float const* rhs_scale;
  bool per_channel;    // rhs_scale is [>= n], else one value
  float const* bias;   // [n], or null
  void* out;           // [m, out_pitch]
  Activation activation;
  int swizzle;
  int sm_count;
  bool dependent;      // start while the kernel before on the stream still runs, and wait inside
  cudaStream_t stream;
};

// What a compiled instance offers. Each returns null, or why it failed.
struct GemmFunctions {
  char const* (*prepare)();
  char const* (*launch)(GemmProblem const&);
};

// Loads a kernel on the current device: before its first launch, outside of stream capture.
char const* gemm_prepare(Kernel kernel, Out out);
char const* gemm_launch(Kernel kernel, Out out, GemmProblem const& problem);

}  // namespace jaxfp8
