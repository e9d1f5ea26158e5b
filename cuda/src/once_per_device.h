// What has to be done once on each device before a kernel is launched.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>

namespace jaxfp8 {

// NOTES: at the first launch, which may be inside a stream capture of XLA's. XLA has a stage for
// it, Initialize, but calls that before every execution, up to twice a call: 28 and 33 us of the
// host's time for 16 layers (H200, 2026-11-30). Modules may be loaded in any capture whose thread
// says so; in that of jax 0.11.2 it was seen to work without that too. Where XLA calls the handler
// directly, modules are loaded in the middle of an execution, as those of cuBLAS are; whether that
// can meet a collective under way on another device was not tested.
class OncePerDevice {
 public:
  // Runs `prepare` if it has not succeeded yet on the current device. Two threads may both run it.
  template <class Prepare>
  char const* call(Prepare prepare) {
    int device = 0;
    cudaGetDevice(&device);
    uint64_t const bit = uint64_t{1} << (device % 64);
    if (device < 64 && (done_.load(std::memory_order_acquire) & bit)) return nullptr;
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaThreadExchangeStreamCaptureMode(&mode);
    char const* why = prepare();
    cudaThreadExchangeStreamCaptureMode(&mode);
    if (why == nullptr) done_.fetch_or(bit, std::memory_order_release);
    return why;
  }

 private:
  std::atomic<uint64_t> done_{0};
};

}  // namespace jaxfp8
