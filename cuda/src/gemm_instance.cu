// One kernel of kernels.h, whose name JAXFP8_KERNEL is, for every kind of result: together they take
// nvcc 46 s of processor time, apart 81.
#include "gemm.cuh"

#if !defined(JAXFP8_KERNEL)
#error "Compile with -DJAXFP8_KERNEL=<a name in kernels.h>"
#endif

namespace jaxfp8 {

#define JAXFP8_CONCAT(a, b) JAXFP8_CONCAT_(a, b)
#define JAXFP8_CONCAT_(a, b) a##_##b

// gemm.cc declares and collects these.
GemmFunctions JAXFP8_CONCAT(JAXFP8_KERNEL, functions)(Stored what) {
  constexpr Kernel kKernel = Kernel::JAXFP8_KERNEL;
  switch (what) {
    case Stored::kF32: return {&Gemm<kKernel, float>::prepare, &Gemm<kKernel, float>::launch};
    case Stored::kE4M3:
      return {&Gemm<kKernel, cutlass::float_e4m3_t>::prepare,
              &Gemm<kKernel, cutlass::float_e4m3_t>::launch};
    default: return {&Gemm<kKernel, uint16_t>::prepare, &Gemm<kKernel, uint16_t>::launch};
  }
}

}  // namespace jaxfp8
