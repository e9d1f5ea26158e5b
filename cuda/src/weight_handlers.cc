// The XLA custom calls that write a loaded weight into a padded one.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <string>

#include "ffi_checks.h"
#include "product.h"
#include "weight.h"
#include "xla/ffi/api/ffi.h"

namespace jaxfp8 {
namespace {

constexpr int64_t kMaxStack = 65535;  // a grid's second axis

bool same_shape(ffi::AnyBuffer a, ffi::AnyBuffer b) {
  auto const x = a.dimensions(), y = b.dimensions();
  return std::equal(x.begin(), x.end(), y.begin(), y.end());
}

// Fills what the weights say, of `[*stack, k, n]` or `[*stack, n, k]`; false if they cannot be some,
// or are not alike.
bool describe_weights(ffi::RemainingArgs const& ws, int32_t in_out, cudaStream_t stream,
                      WeightProblem* p) {
  if (ws.size() == 0 || ws.size() > kMaxWeights) return false;
  p->count = static_cast<int>(ws.size());
  for (int i = 0; i < p->count; ++i) {
    auto const first = ws.get<ffi::AnyBuffer>(0), w = ws.get<ffi::AnyBuffer>(i);
    if (!w.has_value() || w->element_type() != first->element_type() ||
        !same_shape(*w, *first)) {
      return false;
    }
    p->w[i] = w->untyped_data();
  }
  auto const w = *ws.get<ffi::AnyBuffer>(0);
  auto const shape = w.dimensions();
  if (shape.size() < 2 || !find_in(w.element_type(), &p->in)) return false;
  int64_t stack = 1;
  for (size_t axis = 0; axis + 2 < shape.size(); ++axis) stack *= shape[axis];
  int64_t const k = shape[shape.size() - (in_out ? 2 : 1)];
  int64_t const n = shape[shape.size() - (in_out ? 1 : 2)];
  if (stack > kMaxStack || k < 1 || n < 1 || k > kMaxSize || n > kMaxSize) return false;
  p->stack = static_cast<int>(stack), p->k = static_cast<int>(k), p->n = static_cast<int>(n);
  p->n_pad = (p->n + 15) / 16 * 16, p->k_pad = (p->k + 15) / 16 * 16;
  p->in_out = in_out != 0;
  p->stream = stream;
  return true;
}

bool is_floats(ffi::AnyBuffer const& b, int64_t count) {
  return b.element_type() == ffi::F32 && static_cast<int64_t>(b.element_count()) == count;
}

ffi::Error run(WeightProblem const& p, int32_t device) {
  if (p.stack == 0) return ffi::Error::Success();
  OnDevice const guard(device);
  char const* const why = weight_launch(p);
  return why == nullptr ? ffi::Error::Success() : refuse("writing a weight failed: ", why);
}

std::string shape_of_first(ffi::RemainingArgs const& ws) {
  auto const w = ws.get<ffi::AnyBuffer>(0);
  return std::to_string(ws.size()) + " of " + (w.has_value() ? shape_of(*w) : "nothing");
}

ffi::Error weight_scale(cudaStream_t stream, int32_t device, ffi::RemainingArgs ws,
                        ffi::Result<ffi::AnyBuffer> scale, int32_t in_out) {
  WeightProblem p{};
  if (!describe_weights(ws, in_out, stream, &p) ||
      !is_floats(*scale, int64_t{p.count} * p.stack * p.n)) {
    return refuse("weights must be up to ", kMaxWeights, " alike, BF16, F16 or F32, of two axes or "
                  "more, and scale F32, one for each output feature; got ", shape_of_first(ws),
                  ", ", shape_of(*scale));
  }
  p.measured = scale->typed_data<float>();
  return run(p, device);
}

// Results: the qvalues, then the scales.
ffi::Error pad_weight(cudaStream_t stream, int32_t device, ffi::AnyBuffer given,
                      ffi::RemainingArgs ws, ffi::RemainingRets results, int32_t in_out) {
  WeightProblem p{};
  bool fits = describe_weights(ws, in_out, stream, &p) &&
              static_cast<int>(results.size()) == 2 * p.count &&
              (given.element_count() == 0 || is_floats(given, int64_t{p.count} * p.stack * p.n));
  int64_t const rows = int64_t{p.stack} * p.n_pad;
  for (int i = 0; fits && i < p.count; ++i) {
    ffi::AnyBuffer const qvalue = **results.get<ffi::AnyBuffer>(i);
    ffi::AnyBuffer scale = **results.get<ffi::AnyBuffer>(p.count + i);
    auto const padded = qvalue.dimensions();
    fits = qvalue.element_type() == ffi::F8E4M3FN && padded.size() >= 2 &&
           padded[padded.size() - 2] == p.n_pad && padded[padded.size() - 1] == p.k_pad &&
           static_cast<int64_t>(qvalue.element_count()) == rows * p.k_pad &&
           is_floats(scale, rows);
    p.q[i] = qvalue.untyped_data();
    p.scale[i] = scale.typed_data<float>();
  }
  if (!fits) {
    return refuse("weights must be up to ", kMaxWeights, " alike, BF16, F16 or F32, the qvalues "
                  "their padded F8E4M3FN in K-major order, and the scales F32, one for each output "
                  "feature (the given ones logical, or absent); got ", shape_of_first(ws),
                  ", given ", shape_of(given), " and ", results.size(), " results");
  }
  p.given = given.element_count() == 0 ? nullptr : given.typed_data<float>();
  return run(p, device);
}

}  // namespace

JAXFP8_HANDLER(jaxfp8_weight_scale_v1_execute, weight_scale,
               ffi::Ffi::Bind()
                   .Ctx<ffi::PlatformStream<cudaStream_t>>()
                   .Ctx<ffi::DeviceOrdinal>()
                   .RemainingArgs()        // weights
                   .Ret<ffi::AnyBuffer>()  // scale
                   .Attr<int32_t>("in_out"),
               {ffi::Traits::kCmdBufferCompatible});
JAXFP8_HANDLER(jaxfp8_pad_weight_v1_execute, pad_weight,
               ffi::Ffi::Bind()
                   .Ctx<ffi::PlatformStream<cudaStream_t>>()
                   .Ctx<ffi::DeviceOrdinal>()
                   .Arg<ffi::AnyBuffer>()  // given
                   .RemainingArgs()        // weights
                   .RemainingRets()        // qvalues, scales
                   .Attr<int32_t>("in_out"),
               {ffi::Traits::kCmdBufferCompatible});

}  // namespace jaxfp8
