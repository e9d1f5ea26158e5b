// One kernel of kernels.h for one kind of result: JAXFP8_KERNEL is its name, JAXFP8_STORED is
// 16bits, f32 or e4m3.
#include "gemm.cuh"

#if !defined(JAXFP8_KERNEL) || !defined(JAXFP8_STORED)
#error "Compile with -DJAXFP8_KERNEL=<a name in kernels.h> -DJAXFP8_STORED=<16bits, f32 or e4m3>"
#endif

namespace jaxfp8 {

using stored_16bits = uint16_t;
using stored_f32 = float;
using stored_e4m3 = cutlass::float_e4m3_t;

#define JAXFP8_CONCAT(a, b) JAXFP8_CONCAT_(a, b)
#define JAXFP8_CONCAT_(a, b) a##_##b

// gemm.cc declares and collects these.
GemmFunctions JAXFP8_CONCAT(JAXFP8_KERNEL, JAXFP8_STORED)() {
  using Instance = Gemm<Kernel::JAXFP8_KERNEL, JAXFP8_CONCAT(stored, JAXFP8_STORED)>;
  return {&Instance::prepare, &Instance::launch};
}

}  // namespace jaxfp8
