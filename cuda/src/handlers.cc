// The XLA custom calls. Python has checked everything in full sentences; what it did not catch is
// refused again here, naming shapes and the kernel.
//
// NOTES: no allocation, no synchronization, no default stream, no current device: XLA's stream and
// device ordinal are used throughout, so the calls can be captured into a command buffer.
#include <cuda_runtime_api.h>

#include <algorithm>

#include "ffi_checks.h"
#include "product.h"
#include "quantize.h"
#include "xla/ffi/api/ffi.h"

namespace jaxfp8 {
namespace ffi = xla::ffi;

namespace {

ffi::Error scaled_matmul(cudaStream_t stream, int32_t device, ffi::AnyBuffer lhs,
                         ffi::AnyBuffer qvalue, ffi::AnyBuffer lhs_scale, ffi::AnyBuffer scale,
                         ffi::AnyBuffer bias, ffi::AnyBuffer out_scale,
                         ffi::AnyBuffer residual, ffi::Result<ffi::AnyBuffer> out,
                         int32_t activation, int32_t kernel, int64_t out_features,
                         int32_t promoted) {
  Out out_type;
  if (!is_matrix(lhs, ffi::F8E4M3FN) || !is_matrix(qvalue, ffi::F8E4M3FN) ||
      out->dimensions().size() != 2 || !find_out(out->element_type(), &out_type)) {
    return refuse(
        "lhs and qvalue must be F8E4M3FN matrices and out one of BF16, F16, F32, F8E4M3FN; got ",
        shape_of(lhs), ", ", shape_of(qvalue), ", ", shape_of(*out));
  }
  Product const product{qvalue, scale, bias, out_scale, residual, *out, out_features, activation};
  int64_t const m = lhs.dimensions()[0];
  GemmProblem p{};
  if (!product.describe(m, lhs.dimensions()[1], out_type, &p) || !is_scale(lhs_scale, m, 2)) {
    return refuse("shapes do not fit: lhs ", shape_of(lhs), ", lhs_scale ", shape_of(lhs_scale),
                  ", ", product.shapes());
  }
  if (m == 0) return ffi::Error::Success();
  p.lhs = lhs.untyped_data(), p.lhs_rows = p.m;
  p.lhs_scale = lhs_scale.typed_data<float>();
  p.per_token = lhs_scale.dimensions().size() != 0;
  // After any kernel: what this one reads before it waits, it only brings into L2 (prefetch.cuh).
  p.dependent = true;
  p.stream = stream;

  Kernel const chosen = choose(p.m, p.n, p.k, promoted != 0, kernel, Input::kRowsAlone);
  if (auto error = check_gemm(p, chosen, kernel); error.failure()) return error;
  OnDevice const guard(device);
  return launch_gemm(p, chosen, device);
}

// Fills `q`; false if the shapes do not fit.
bool describe_quantize(ffi::AnyBuffer x, ffi::AnyBuffer x_scale, ffi::AnyBuffer qx,
                       ffi::AnyBuffer qx_scale, cudaStream_t stream, QuantizeProblem* q) {
  if (x.dimensions().size() != 2 || !find_in(x.element_type(), &q->in) ||
      !is_matrix(qx, ffi::F8E4M3FN)) {
    return false;
  }
  int64_t const m = x.dimensions()[0], k = x.dimensions()[1], k_pad = qx.dimensions()[1];
  if (k < 1 || k > k_pad || k_pad % 16 != 0 || qx.dimensions()[0] < m || m > kMaxSize ||
      k_pad > kMaxSize || qx_scale.element_type() != ffi::F32 || !is_scalar_or_empty(x_scale) ||
      static_cast<int64_t>(qx_scale.element_count()) != qx.dimensions()[0]) {
    return false;
  }
  q->m = static_cast<int>(m), q->k = static_cast<int>(k), q->k_pad = static_cast<int>(k_pad);
  q->x = x.untyped_data();
  q->x_scale = x_scale.element_count() != 0 ? x_scale.typed_data<float>() : nullptr;
  q->q = qx.untyped_data();
  q->scale = qx_scale.typed_data<float>();
  q->stream = stream;
  return true;
}

ffi::Error quantize(cudaStream_t stream, int32_t device, ffi::AnyBuffer x, ffi::AnyBuffer x_scale,
                    ffi::Result<ffi::AnyBuffer> qx, ffi::Result<ffi::AnyBuffer> qx_scale) {
  QuantizeProblem q{};
  if (!describe_quantize(x, x_scale, *qx, *qx_scale, stream, &q) ||
      qx->dimensions()[0] != x.dimensions()[0]) {
    return refuse("x must be a BF16, F16 or F32 matrix and the results its F8E4M3FN padded to 16 ",
                  "and F32 scales; got ", shape_of(x), ", ", shape_of(x_scale), ", ",
                  shape_of(*qx), ", ", shape_of(*qx_scale));
  }
  if (q.m == 0) return ffi::Error::Success();
  OnDevice const guard(device);
  char const* const why = quantize_launch(q);
  return why == nullptr ? ffi::Error::Success() : refuse("quantizing failed: ", why);
}

ffi::Error dense(cudaStream_t stream, int32_t device, ffi::AnyBuffer x, ffi::AnyBuffer qvalue,
                 ffi::AnyBuffer scale, ffi::AnyBuffer bias, ffi::AnyBuffer x_scale,
                 ffi::AnyBuffer out_scale, ffi::AnyBuffer residual,
                 ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> qx,
                 ffi::Result<ffi::AnyBuffer> qx_scale, int32_t activation, int32_t kernel,
                 int64_t out_features, int32_t promoted) {
  Out out_type;
  if (x.dimensions().size() != 2 || !is_matrix(qvalue, ffi::F8E4M3FN) ||
      out->dimensions().size() != 2 || !find_out(out->element_type(), &out_type)) {
    return refuse("x and out must be matrices of BF16, F16 or F32 (out of F8E4M3FN too) and qvalue "
                  "one of F8E4M3FN; got ", shape_of(x), ", ", shape_of(*out), ", ",
                  shape_of(qvalue));
  }
  Product const product{qvalue, scale, bias, out_scale, residual, *out, out_features, activation};
  QuantizeProblem q{};
  GemmProblem p{};
  if (!describe_quantize(x, x_scale, *qx, *qx_scale, stream, &q) ||
      !product.describe(q.m, q.k_pad, out_type, &p)) {
    return refuse("shapes do not fit: x ", shape_of(x), ", x_scale ", shape_of(x_scale), ", ",
                  product.shapes(), ", scratch ", shape_of(*qx), " and ", shape_of(*qx_scale));
  }
  if (q.m == 0) return ffi::Error::Success();
  p.lhs = q.q;
  p.lhs_rows = static_cast<int>(std::min(qx->dimensions()[0], kMaxSize));
  p.lhs_scale = q.scale;
  p.per_token = true;
  p.stream = stream;

  Kernel const chosen = choose(p.m, p.n, p.k, promoted != 0, kernel, Input::kQuantizedHere);
  if (auto error = check_gemm(p, chosen, kernel); error.failure()) return error;
  RowClasses const classes = row_classes(chosen, out_type, p.m, p.out_pitch);
  // All classes are read as if they had as many rows as the largest: the scratch must have them.
  if (classes.count * classes.rows(p.m) <= qx->dimensions()[0]) p.classes = q.classes = classes;
  OnDevice const guard(device);
  q.lets_next_start = p.dependent = starts_early(p.m, p.n, p.k);
  if (char const* why = quantize_launch(q)) {
    return failed("loading or launching the quantize kernel", p, chosen, why);
  }
  return launch_gemm(p, chosen, device);
}

}  // namespace

JAXFP8_HANDLER(jaxfp8_scaled_matmul_v1_execute, scaled_matmul,
               ffi::Ffi::Bind()
                   .Ctx<ffi::PlatformStream<cudaStream_t>>()
                   .Ctx<ffi::DeviceOrdinal>()
                   .Arg<ffi::AnyBuffer>()   // lhs
                   .Arg<ffi::AnyBuffer>()   // qvalue
                   .Arg<ffi::AnyBuffer>()   // lhs_scale
                   .Arg<ffi::AnyBuffer>()   // scale
                   .Arg<ffi::AnyBuffer>()   // bias
                   .Arg<ffi::AnyBuffer>()   // out_scale
                   .Arg<ffi::AnyBuffer>()   // residual
                   .Ret<ffi::AnyBuffer>()   // out
                   .Attr<int32_t>("activation")
                   .Attr<int32_t>("kernel")
                   .Attr<int64_t>("out_features")
                   .Attr<int32_t>("promoted"),
               {ffi::Traits::kCmdBufferCompatible});
JAXFP8_HANDLER(jaxfp8_quantize_v1_execute, quantize,
               ffi::Ffi::Bind()
                   .Ctx<ffi::PlatformStream<cudaStream_t>>()
                   .Ctx<ffi::DeviceOrdinal>()
                   .Arg<ffi::AnyBuffer>()   // x
                   .Arg<ffi::AnyBuffer>()   // x_scale
                   .Ret<ffi::AnyBuffer>()   // qx
                   .Ret<ffi::AnyBuffer>(),  // qx_scale
               {ffi::Traits::kCmdBufferCompatible});
JAXFP8_HANDLER(jaxfp8_dense_v1_execute, dense,
               ffi::Ffi::Bind()
                   .Ctx<ffi::PlatformStream<cudaStream_t>>()
                   .Ctx<ffi::DeviceOrdinal>()
                   .Arg<ffi::AnyBuffer>()   // x
                   .Arg<ffi::AnyBuffer>()   // qvalue
                   .Arg<ffi::AnyBuffer>()   // scale
                   .Arg<ffi::AnyBuffer>()   // bias
                   .Arg<ffi::AnyBuffer>()   // x_scale
                   .Arg<ffi::AnyBuffer>()   // out_scale
                   .Arg<ffi::AnyBuffer>()   // residual
                   .Ret<ffi::AnyBuffer>()   // out
                   .Ret<ffi::AnyBuffer>()   // qx, scratch
                   .Ret<ffi::AnyBuffer>()   // qx_scale, scratch
                   .Attr<int32_t>("activation")
                   .Attr<int32_t>("kernel")
                   .Attr<int64_t>("out_features")
                   .Attr<int32_t>("promoted"),
               {ffi::Traits::kCmdBufferCompatible});

}  // namespace jaxfp8
