// Kernels of kernels.h, those that JAXFP8_UNIT names (CMake defines it), for every kind of result.
#include "gemm.cuh"

#if !defined(JAXFP8_UNIT)
#error "Before this comes `#define JAXFP8_UNIT(X) X(<a name in kernels.h>) X(<another>)`"
#endif

namespace jaxfp8 {

template <Kernel kKernel>
static GemmFunctions functions_of(Stored what) {
  switch (what) {
    case Stored::kF32: return {&Gemm<kKernel, float>::prepare, &Gemm<kKernel, float>::launch};
    case Stored::kE4M3:
      return {&Gemm<kKernel, cutlass::float_e4m3_t>::prepare,
              &Gemm<kKernel, cutlass::float_e4m3_t>::launch};
    case Stored::k16BitSum:
      return {&Gemm<kKernel, uint16_t, true>::prepare, &Gemm<kKernel, uint16_t, true>::launch};
    default: return {&Gemm<kKernel, uint16_t>::prepare, &Gemm<kKernel, uint16_t>::launch};
  }
}

// gemm.cc declares and collects these.
#define JAXFP8_DEFINE(name) \
  GemmFunctions name##_functions(Stored what) { return functions_of<Kernel::name>(what); }
JAXFP8_UNIT(JAXFP8_DEFINE)
#undef JAXFP8_DEFINE

}  // namespace jaxfp8
