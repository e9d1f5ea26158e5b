// The compiled instances, by kernel and output type.
#include "gemm.h"

#include "once_per_device.h"

namespace jaxfp8 {

#define JAXFP8_DECLARE(name, ...) \
  GemmFunctions name##_bf16();    \
  GemmFunctions name##_f16();     \
  GemmFunctions name##_f32();
JAXFP8_KERNELS(JAXFP8_DECLARE)
#undef JAXFP8_DECLARE

namespace {

constexpr int kOutCount = static_cast<int>(Out::kCount);

GemmFunctions functions(Kernel kernel, Out out) {
  using Make = GemmFunctions (*)();
  static constexpr Make kInstances[kKernelCount][kOutCount] = {
#define JAXFP8_COLLECT(name, ...) {name##_bf16, name##_f16, name##_f32},
      JAXFP8_KERNELS(JAXFP8_COLLECT)
#undef JAXFP8_COLLECT
  };
  return kInstances[static_cast<int>(kernel)][static_cast<int>(out)]();
}

}  // namespace

char const* gemm_prepare(Kernel kernel, Out out) {
  static OncePerDevice once[kKernelCount][kOutCount];
  return once[static_cast<int>(kernel)][static_cast<int>(out)].call(functions(kernel, out).prepare);
}

char const* gemm_launch(Kernel kernel, Out out, GemmProblem const& problem) {
  return functions(kernel, out).launch(problem);
}

}  // namespace jaxfp8
