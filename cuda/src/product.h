// A product as XLA hands it over: described, checked and launched.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <set>
#include <string>
#include <tuple>

#include "ffi_checks.h"
#include "gemm.h"
#include "table.h"

namespace jaxfp8 {

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

inline ffi::Error check_gemm(GemmProblem const& p, Kernel chosen, int forced) {
  auto const describe = [&] {
    return "M=" + std::to_string(p.m) + " N=" + std::to_string(p.n) + " K=" + std::to_string(p.k) +
           " pitch=" + std::to_string(p.out_pitch) + " kernel=" +
           (forced < kKernelCount ? spec_of(chosen).name : "?");
  };
  if (forced >= kKernelCount) return refuse("there is no kernel ", forced, "; ", describe());
  if (static_cast<int>(p.activation) < 0 || p.activation >= Activation::kCount) {
    return refuse("there is no activation ", static_cast<int>(p.activation), "; ", describe());
  }
  if (p.k % 16 != 0) return refuse("K must be a multiple of 16; ", describe());
  for (void const* address : {p.lhs, p.rhs, static_cast<void const*>(p.out), p.residual}) {
    if (reinterpret_cast<uintptr_t>(address) % 16 != 0) {
      return refuse("an operand is not aligned to 16 bytes; ", describe());
    }
  }
  return ffi::Error::Success();
}

inline ffi::Error failed(char const* what, GemmProblem const& p, Kernel chosen, char const* why) {
  return refuse(what, " failed: ", why, "; M=", p.m, " N=", p.n, " K=", p.k,
                " kernel=", spec_of(chosen).name);
}

// With JAXFP8_PRINT_KERNEL set, each shape's kernel, once.
inline void print_choice(GemmProblem const& p, Kernel chosen) {
  static bool const wanted = std::getenv("JAXFP8_PRINT_KERNEL") != nullptr;
  if (!wanted) return;
  static std::mutex mutex;
  static std::set<std::tuple<int, int, int, int>> printed;
  std::lock_guard<std::mutex> const lock(mutex);
  if (printed.insert({p.m, p.n, p.k, static_cast<int>(chosen)}).second) {
    std::fprintf(stderr, "jaxfp8: M=%d N=%d K=%d -> %s\n", p.m, p.n, p.k,
                 spec_of(chosen).name);
  }
}

inline ffi::Error launch_gemm(GemmProblem& p, Kernel chosen, int device) {
  print_choice(p, chosen);
  cudaError_t const status =
      cudaDeviceGetAttribute(&p.sm_count, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return failed("the device", p, chosen, cudaGetErrorString(status));
  if (char const* why = gemm_launch(chosen, p)) {
    return failed("loading or launching the kernel", p, chosen, why);
  }
  return ffi::Error::Success();
}

// Rounded up to tiles, or a step of the quantize kernel (1024 threads of 8 elements) further, still
// an int.
inline constexpr int64_t kMaxSize = 0x7fffffff - 8192;

// What the products have in common: the weight, what is added and applied, and the result.
struct Product {
  ffi::AnyBuffer qvalue, scale, bias, out_scale, residual, out;
  int64_t out_features;
  int32_t activation;

  // Fills `p`; false if the shapes do not fit a result of m rows from k features.
  bool describe(int64_t m, int64_t k, Out out_type, GemmProblem* p) const {
    int64_t const n_pad = qvalue.dimensions()[0];
    bool const quantized = out_type == Out::kE4M3;
    int64_t const width = quantized ? n_pad : out_features;  // of e4m3, padding is written too
    if (k < 1 || qvalue.dimensions()[1] != k || out_features < 1 || out_features > n_pad ||
        out.dimensions()[0] != m || out.dimensions()[1] != width || !is_scale(scale, n_pad, 1) ||
        !is_vector_or_empty(bias, out_features) || !is_scalar_or_empty(out_scale) ||
        (out_scale.element_count() != 0) != quantized || (quantized && n_pad % 16 != 0) ||
        (has_residual() && (bytes_of(out_type) != 2 || width * 2 % 16 != 0 ||
                            residual.element_type() != out.element_type() ||
                            !is_shaped_as(residual, out))) ||
        m > kMaxSize || n_pad > kMaxSize || k > kMaxSize) {
      return false;
    }
    p->m = static_cast<int>(m), p->n = static_cast<int>(width), p->k = static_cast<int>(k);
    p->out_pitch = width;
    p->rhs = qvalue.untyped_data(), p->out = out.untyped_data();
    p->rhs_scale = scale.typed_data<float>();
    p->per_channel = scale.dimensions().size() != 0;
    p->bias = bias.element_count() != 0 ? bias.typed_data<float>() : nullptr;
    p->bias_features = static_cast<int>(out_features);
    p->out_type = out_type;
    p->out_scale = quantized ? out_scale.typed_data<float>() : nullptr;
    p->residual = has_residual() ? residual.untyped_data() : nullptr;
    p->activation = static_cast<Activation>(activation);
    return true;
  }

  bool has_residual() const { return residual.element_count() != 0; }

  std::string shapes() const {
    return "qvalue " + shape_of(qvalue) + ", scale " + shape_of(scale) + ", bias " +
           shape_of(bias) + ", out_scale " + shape_of(out_scale) + ", residual " +
           shape_of(residual) + ", out_features " + std::to_string(out_features) + ", out " +
           shape_of(out);
  }
};

}  // namespace jaxfp8
