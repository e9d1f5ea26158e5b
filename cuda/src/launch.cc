// Plain C entries to the two kernels, for benchmarks that time them beside other libraries on raw
// pointers. The layer goes through handlers.cc; these check nothing.
#include <cuda_runtime_api.h>

#include "gemm.h"
#include "quantize.h"
#include "table.h"

#define JAXFP8_EXPORT extern "C" __attribute__((visibility("default")))

namespace jaxfp8 {

// Returns null, or why it failed. `kernel` -1 is the table's choice; `bias` may be null;
// of lhs, `lhs_rows` lie in memory, m or more; `dependent` asks for dependent launch, as a product
// of quantized inputs does.
JAXFP8_EXPORT char const* jaxfp8_launch_gemm(int kernel, int promoted, int out_type, int m, int n,
                                             int k, void const* lhs, int lhs_rows,
                                             void const* rhs,
                                             float const* lhs_scale, int per_token,
                                             float const* rhs_scale, int per_channel,
                                             float const* bias, void* out, int64_t out_pitch,
                                             int activation, int dependent,
                                             void* stream) {
  if (static_cast<Out>(out_type) == Out::kE4M3) return "there is no out_scale for an e4m3 result";
  Kernel const picked = choose(m, n, k, promoted != 0, kernel);
  GemmProblem p{};
  p.m = m, p.n = n, p.k = k, p.out_pitch = out_pitch;
  p.lhs = lhs, p.lhs_rows = lhs_rows, p.rhs = rhs, p.out = out;
  p.lhs_scale = lhs_scale, p.per_token = per_token != 0;
  p.rhs_scale = rhs_scale, p.per_channel = per_channel != 0;
  p.bias = bias;
  p.bias_features = n;
  p.activation = static_cast<Activation>(activation);
  p.dependent = dependent != 0;
  p.stream = static_cast<cudaStream_t>(stream);
  int device = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&p.sm_count, cudaDevAttrMultiProcessorCount, device);
  p.out_type = static_cast<Out>(out_type);
  return gemm_launch(picked, p);
}

// Returns null, or why it failed. `x_scale` null: a scale for each row.
JAXFP8_EXPORT char const* jaxfp8_launch_quantize(int in_type, int m, int k, int k_pad,
                                                 void const* x, float const* x_scale, void* q,
                                                 float* scale, void* stream) {
  QuantizeProblem p{};
  p.m = m, p.k = k, p.k_pad = k_pad;
  p.x = x, p.in = static_cast<In>(in_type), p.x_scale = x_scale;
  p.q = q, p.scale = scale;
  p.stream = static_cast<cudaStream_t>(stream);
  return quantize_launch(p);
}

}  // namespace jaxfp8
