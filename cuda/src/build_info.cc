// What the library is, as JSON: read by jaxfp8/_cutlass.py before anything is registered.
#include <cuda_runtime_api.h>

#include <sstream>
#include <string>

#include "kernels.h"
#include "xla/ffi/api/c_api.h"

namespace jaxfp8 {

// Raised when the handlers accept calls that they refused before: jaxfp8/_cutlass.py says what it
// needs. 2: the scratch of the dense call may have more rows than x. 3: quantized operands in and
// out, which changed the operands of version 1 before anyone had it. 4: weights are measured and
// written. 5: a handler has one stage, and loads its kernels at its first call. 6: a residual, an
// operand more of version 1 before anyone had it.
constexpr int kCalls = 6;

extern "C" __attribute__((visibility("default"))) char const* jaxfp8_build_info() {
  static std::string const info = [] {
    std::ostringstream json;
    json << "{\"calls\": " << kCalls << ", \"ffi\": [" << XLA_FFI_API_MAJOR << ", "
         << XLA_FFI_API_MINOR << "], \"cuda\": " << CUDART_VERSION;
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
