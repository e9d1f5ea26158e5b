// One kernel of kernels.h for one output type: JAXFP8_KERNEL is its name, JAXFP8_OUT is bf16, f16
// or f32.
#include "gemm.cuh"

#if !defined(JAXFP8_KERNEL) || !defined(JAXFP8_OUT)
#error "Compile with -DJAXFP8_KERNEL=<a name in kernels.h> -DJAXFP8_OUT=<bf16, f16 or f32>"
#endif

namespace jaxfp8 {

using bf16 = cutlass::bfloat16_t;
using f16 = cutlass::half_t;
using f32 = float;

#define JAXFP8_CONCAT(a, b) JAXFP8_CONCAT_(a, b)
#define JAXFP8_CONCAT_(a, b) a##_##b

// gemm.cc declares and collects these.
GemmFunctions JAXFP8_CONCAT(JAXFP8_KERNEL, JAXFP8_OUT)() {
  using Instance = Gemm<Kernel::JAXFP8_KERNEL, JAXFP8_OUT>;
  return {&Instance::prepare, &Instance::launch};
}

}  // namespace jaxfp8
