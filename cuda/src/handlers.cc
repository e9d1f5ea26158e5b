// The XLA custom calls. Python has checked everything in full sentences; what it did not catch is
// refused again here, naming shapes and the kernel.
//
// NOTES: no allocation, no synchronization, no default stream, no current device: XLA's stream and
// device ordinal are used throughout, so the calls can be captured into a command buffer.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <tuple>
#include <utility>

#include "ffi_checks.h"
#include "gemm.h"
#include "quantize.h"
#include "table.h"
#include "xla/ffi/api/ffi.h"

namespace jaxfp8 {
namespace ffi = xla::ffi;

namespace {

// XLA's device becomes the current one for a scope, and the caller's comes back after it.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    cudaGetDevice(&previous_);
    if (previous_ != device) cudaSetDevice(device);
    device_ = device;
  }
  ~OnDevice() {
    if (previous_ != device_) cudaSetDevice(previous_);
  }
  OnDevice(OnDevice const&) = delete;

 private:
  int previous_ = 0, device_ = 0;
};

ffi::Error check_gemm(GemmProblem const& p, Choice choice, int forced) {
  auto const describe = [&] {
    return "M=" + std::to_string(p.m) + " N=" + std::to_string(p.n) + " K=" + std::to_string(p.k) +
           " pitch=" + std::to_string(p.out_pitch) + " kernel=" +
           (forced < kKernelCount ? spec_of(choice.kernel).name : "?");
  };
  if (forced >= kKernelCount) return refuse("there is no kernel ", forced, "; ", describe());
  if (static_cast<int>(p.activation) < 0 || p.activation >= Activation::kCount) {
    return refuse("there is no activation ", static_cast<int>(p.activation), "; ", describe());
  }
  if (p.k % 16 != 0) return refuse("K must be a multiple of 16; ", describe());
  for (void const* address : {p.lhs, p.rhs, static_cast<void const*>(p.out)}) {
    if (reinterpret_cast<uintptr_t>(address) % 16 != 0) {
      return refuse("an operand is not aligned to 16 bytes; ", describe());
    }
  }
  return ffi::Error::Success();
}

ffi::Error failed(char const* what, GemmProblem const& p, Choice choice, char const* why) {
  return refuse(what, " failed: ", why, "; M=", p.m, " N=", p.n, " K=", p.k,
                " kernel=", spec_of(choice.kernel).name);
}

// With JAXFP8_PRINT_KERNEL set, each shape's kernel, once.
void print_choice(GemmProblem const& p, Choice choice) {
  static bool const wanted = std::getenv("JAXFP8_PRINT_KERNEL") != nullptr;
  if (!wanted) return;
  static std::mutex mutex;
  static std::set<std::tuple<int, int, int, int>> printed;
  std::lock_guard<std::mutex> const lock(mutex);
  if (printed.insert({p.m, p.n, p.k, static_cast<int>(choice.kernel)}).second) {
    std::fprintf(stderr, "jaxfp8: M=%d N=%d K=%d -> %s, swizzle %d\n", p.m, p.n, p.k,
                 spec_of(choice.kernel).name, choice.swizzle);
  }
}

// Before every execution and outside of capture: XLA's Initialize stage.
ffi::Error prepare_gemm(GemmProblem const& p, Choice choice, Out out) {
  if (char const* why = gemm_prepare(choice.kernel, out)) {
    return failed("preparing the kernel", p, choice, why);
  }
  print_choice(p, choice);
  return ffi::Error::Success();
}

ffi::Error launch_gemm(GemmProblem& p, Choice choice, Out out, int device) {
  p.swizzle = choice.swizzle;
  cudaError_t const status =
      cudaDeviceGetAttribute(&p.sm_count, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return failed("the device", p, choice, cudaGetErrorString(status));
  if (char const* why = gemm_launch(choice.kernel, out, p)) {
    return failed("the launch", p, choice, why);
  }
  return ffi::Error::Success();
}

constexpr int64_t kMaxSize = 0x7fffffff - 1024;  // rounded up to tiles, still an int

enum class Stage { kInitialize, kExecute };

template <Stage kStage>
ffi::Error scaled_matmul(cudaStream_t stream, int32_t device, ffi::AnyBuffer lhs,
                         ffi::AnyBuffer rhs, ffi::AnyBuffer lhs_scale, ffi::AnyBuffer rhs_scale,
                         ffi::AnyBuffer bias, ffi::Result<ffi::AnyBuffer> out, int32_t activation,
                         int32_t kernel, int32_t promoted) {
  Out out_type;
  if (!is_matrix(lhs, ffi::F8E4M3FN) || !is_matrix(rhs, ffi::F8E4M3FN) ||
      out->dimensions().size() != 2 || !find_out(out->element_type(), &out_type)) {
    return refuse("lhs and rhs must be F8E4M3FN matrices and out one of BF16, F16, F32; got ",
                  shape_of(lhs), ", ", shape_of(rhs), ", ", shape_of(*out));
  }
  int64_t const m = lhs.dimensions()[0], n = rhs.dimensions()[0], k = rhs.dimensions()[1];
  if (lhs.dimensions()[1] != k || out->dimensions()[0] != m || out->dimensions()[1] != n ||
      !is_scale(lhs_scale, m, 2) || !is_scale(rhs_scale, n, 1) || !is_vector_or_empty(bias, n) ||
      m > kMaxSize || n > kMaxSize || k > kMaxSize) {
    return refuse("shapes do not fit: lhs ", shape_of(lhs), ", rhs ", shape_of(rhs),
                  ", lhs_scale ", shape_of(lhs_scale), ", rhs_scale ", shape_of(rhs_scale),
                  ", bias ", shape_of(bias), ", out ", shape_of(*out));
  }
  if (m == 0 || n == 0) return ffi::Error::Success();

  GemmProblem p{};
  p.m = static_cast<int>(m), p.n = static_cast<int>(n), p.k = static_cast<int>(k);
  p.out_pitch = n;
  p.lhs = lhs.untyped_data(), p.rhs = rhs.untyped_data(), p.out = out->untyped_data();
  p.lhs_scale = lhs_scale.typed_data<float>();
  p.per_token = lhs_scale.dimensions().size() != 0;
  p.rhs_scale = rhs_scale.typed_data<float>();
  p.per_channel = rhs_scale.dimensions().size() != 0;
  p.bias = bias.element_count() != 0 ? bias.typed_data<float>() : nullptr;
  p.activation = static_cast<Activation>(activation);
  p.stream = stream;

  Choice const choice = choose(p.m, p.n, p.k, promoted != 0, kernel);
  if (auto error = check_gemm(p, choice, kernel); error.failure()) return error;
  OnDevice const guard(device);
  if constexpr (kStage == Stage::kInitialize) return prepare_gemm(p, choice, out_type);
  return launch_gemm(p, choice, out_type, device);
}

template <Stage kStage>
ffi::Error dense(cudaStream_t stream, int32_t device, ffi::AnyBuffer x, ffi::AnyBuffer qvalue,
                 ffi::AnyBuffer scale, ffi::AnyBuffer bias, ffi::AnyBuffer x_scale,
                 ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> qx,
                 ffi::Result<ffi::AnyBuffer> qx_scale, int32_t activation, int32_t kernel,
                 int64_t out_features, int32_t promoted) {
  Out out_type, in_type;
  if (x.dimensions().size() != 2 || !find_out(x.element_type(), &in_type) ||
      !is_matrix(qvalue, ffi::F8E4M3FN) || !is_matrix(*qx, ffi::F8E4M3FN) ||
      out->dimensions().size() != 2 || !find_out(out->element_type(), &out_type)) {
    return refuse("x and out must be BF16, F16 or F32 matrices and qvalue one of F8E4M3FN; got ",
                  shape_of(x), ", ", shape_of(*out), ", ", shape_of(qvalue));
  }
  int64_t const m = x.dimensions()[0], k = x.dimensions()[1], n = out_features;
  int64_t const n_pad = qvalue.dimensions()[0], k_pad = qvalue.dimensions()[1];
  if (k < 1 || k > k_pad || n < 1 || n > n_pad || out->dimensions()[0] != m ||
      out->dimensions()[1] != n || qx->dimensions()[0] < m || qx->dimensions()[1] != k_pad ||
      static_cast<int64_t>(qx_scale->element_count()) != qx->dimensions()[0] || !is_scale(scale, n_pad, 1) ||
      !is_vector_or_empty(bias, n) || !is_scalar_or_empty(x_scale) || m > kMaxSize ||
      n_pad > kMaxSize || k_pad > kMaxSize) {
    return refuse("shapes do not fit: x ", shape_of(x), ", qvalue ", shape_of(qvalue), ", scale ",
                  shape_of(scale), ", bias ", shape_of(bias), ", x_scale ", shape_of(x_scale),
                  ", out_features ", n, ", out ", shape_of(*out), ", scratch ", shape_of(*qx),
                  " and ", shape_of(*qx_scale));
  }
  if (m == 0) return ffi::Error::Success();

  QuantizeProblem q{};
  q.m = static_cast<int>(m), q.k = static_cast<int>(k), q.k_pad = static_cast<int>(k_pad);
  q.x = x.untyped_data();
  q.in = static_cast<In>(in_type);
  q.x_scale = x_scale.element_count() != 0 ? x_scale.typed_data<float>() : nullptr;
  q.q = qx->untyped_data();
  q.scale = qx_scale->typed_data<float>();
  q.stream = stream;

  GemmProblem p{};
  p.m = q.m, p.n = static_cast<int>(n), p.k = q.k_pad;
  p.out_pitch = n;
  p.lhs = q.q, p.rhs = qvalue.untyped_data(), p.out = out->untyped_data();
  p.lhs_scale = q.scale;
  p.per_token = true;
  p.rhs_scale = scale.typed_data<float>();
  p.per_channel = scale.dimensions().size() != 0;
  p.bias = bias.element_count() != 0 ? bias.typed_data<float>() : nullptr;
  p.activation = static_cast<Activation>(activation);
  p.stream = stream;

  Choice const choice = choose(p.m, p.n, p.k, promoted != 0, kernel);
  if (auto error = check_gemm(p, choice, kernel); error.failure()) return error;
  RowClasses const classes = row_classes(choice.kernel, out_type, p.m, p.out_pitch);
  // All classes are read as if they had as many rows as the largest: the scratch must have them.
  if (classes.count * classes.rows(p.m) <= qx->dimensions()[0]) p.classes = q.classes = classes;
  OnDevice const guard(device);
  if constexpr (kStage == Stage::kInitialize) {
    if (char const* why = quantize_prepare()) {
      return failed("preparing the quantize kernel", p, choice, why);
    }
    return prepare_gemm(p, choice, out_type);
  }
  if (char const* why = quantize_launch(q)) return failed("the quantize kernel", p, choice, why);
  p.dependent = starts_early(p.m, p.n, p.k);
  return launch_gemm(p, choice, out_type, device);
}

template <class Binding>
auto bind_matmul(Binding binding) {
  return std::move(binding).template Ctx<ffi::PlatformStream<cudaStream_t>>()
      .template Ctx<ffi::DeviceOrdinal>()
      .template Arg<ffi::AnyBuffer>()   // lhs
      .template Arg<ffi::AnyBuffer>()   // rhs
      .template Arg<ffi::AnyBuffer>()   // lhs_scale
      .template Arg<ffi::AnyBuffer>()   // rhs_scale
      .template Arg<ffi::AnyBuffer>()   // bias
      .template Ret<ffi::AnyBuffer>()   // out
      .template Attr<int32_t>("activation")
      .template Attr<int32_t>("kernel")
      .template Attr<int32_t>("promoted");
}

template <class Binding>
auto bind_dense(Binding binding) {
  return std::move(binding).template Ctx<ffi::PlatformStream<cudaStream_t>>()
      .template Ctx<ffi::DeviceOrdinal>()
      .template Arg<ffi::AnyBuffer>()   // x
      .template Arg<ffi::AnyBuffer>()   // qvalue
      .template Arg<ffi::AnyBuffer>()   // scale
      .template Arg<ffi::AnyBuffer>()   // bias
      .template Arg<ffi::AnyBuffer>()   // x_scale
      .template Ret<ffi::AnyBuffer>()   // out
      .template Ret<ffi::AnyBuffer>()   // qx, scratch
      .template Ret<ffi::AnyBuffer>()   // qx_scale, scratch
      .template Attr<int32_t>("activation")
      .template Attr<int32_t>("kernel")
      .template Attr<int64_t>("out_features")
      .template Attr<int32_t>("promoted");
}

}  // namespace

// The macro declares an extern "C" function; this makes it visible outside the library.
#define JAXFP8_HANDLER(name, function, binding, ...)                                             \
  extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* name(XLA_FFI_CallFrame*);      \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, function, binding __VA_OPT__(, ) __VA_ARGS__)

JAXFP8_HANDLER(jaxfp8_scaled_matmul_v1_initialize, scaled_matmul<Stage::kInitialize>,
               bind_matmul(ffi::Ffi::BindInitialize()));
JAXFP8_HANDLER(jaxfp8_scaled_matmul_v1_execute, scaled_matmul<Stage::kExecute>,
               bind_matmul(ffi::Ffi::Bind()), {ffi::Traits::kCmdBufferCompatible});
JAXFP8_HANDLER(jaxfp8_dense_v1_initialize, dense<Stage::kInitialize>,
               bind_dense(ffi::Ffi::BindInitialize()));
JAXFP8_HANDLER(jaxfp8_dense_v1_execute, dense<Stage::kExecute>, bind_dense(ffi::Ffi::Bind()),
               {ffi::Traits::kCmdBufferCompatible});

// Raised when the handlers accept calls that they refused before: jaxfp8/_cutlass.py says what it
// needs. 2: the scratch of the dense call may have more rows than x.
constexpr int kCalls = 2;

// What the library is, as JSON: read by jaxfp8/_cutlass.py before anything is registered.
extern "C" __attribute__((visibility("default"))) char const* jaxfp8_build_info() {
  static std::string const info = [] {
    std::ostringstream json;
    json << "{\"calls\": " << kCalls << ", \"ffi\": [" << XLA_FFI_API_MAJOR << ", " << XLA_FFI_API_MINOR
         << "], \"cuda\": " << CUDART_VERSION;
#ifdef JAXFP8_CUTLASS_VERSION
    json << ", \"cutlass\": \"" JAXFP8_CUTLASS_VERSION "\"";
#endif
#ifdef JAXFP8_SOURCE_HASH
    json << ", \"source\": \"" JAXFP8_SOURCE_HASH "\"";
#endif
    json << ", \"kernels\": [";
    for (int i = 0; i < kKernelCount; ++i) {
      json << (i ? ", " : "") << '"' << kKernelSpecs[i].name << '"';
    }
    json << "]}";
    return json.str();
  }();
  return info.c_str();
}

}  // namespace jaxfp8
