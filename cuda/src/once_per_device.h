// What has to be done once on each device, outside of stream capture.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>

namespace jaxfp8 {

// NOTES: XLA calls a handler's Initialize stage before every execution, so this must be cheap the
// second time: without it loading 45 modules again took 30 us of host time a call (H200).
class OncePerDevice {
 public:
  // Runs `prepare` if it has not succeeded yet on the current device. Two threads may both run it.
  template <class Prepare>
  char const* call(Prepare prepare) {
    int device = 0;
    cudaGetDevice(&device);
    uint64_t const bit = uint64_t{1} << (device % 64);
    if (device < 64 && (done_.load(std::memory_order_acquire) & bit)) return nullptr;
    char const* why = prepare();
    if (why == nullptr) done_.fetch_or(bit, std::memory_order_release);
    return why;
  }

 private:
  std::atomic<uint64_t> done_{0};
};

}  // namespace jaxfp8
