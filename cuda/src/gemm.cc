// The compiled instances, by kernel and what they store.
#include "gemm.h"

#include "once_per_device.h"

namespace jaxfp8 {

#define JAXFP8_DECLARE(name, ...) GemmFunctions name##_functions(Stored what);
JAXFP8_KERNELS(JAXFP8_DECLARE)
#undef JAXFP8_DECLARE

namespace {

constexpr int kStoredCount = static_cast<int>(Stored::kCount);

GemmFunctions functions(Kernel kernel, Stored what) {
  using Functions = GemmFunctions (*)(Stored);
  static constexpr Functions kInstances[kKernelCount] = {
#define JAXFP8_COLLECT(name, ...) name##_functions,
      JAXFP8_KERNELS(JAXFP8_COLLECT)
#undef JAXFP8_COLLECT
  };
  return kInstances[static_cast<int>(kernel)](what);
}

}  // namespace

char const* gemm_launch(Kernel kernel, GemmProblem const& problem) {
  static OncePerDevice once[kKernelCount][kStoredCount];
  Stored const what = stored(problem.out_type, problem.residual != nullptr);
  GemmFunctions const instance = functions(kernel, what);
  auto& prepared = once[static_cast<int>(kernel)][static_cast<int>(what)];
  if (char const* why = prepared.call(instance.prepare)) return why;
  return instance.launch(problem);
}

}  // namespace jaxfp8
