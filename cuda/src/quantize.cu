// x -> e4m3, zero-padded to k_pad, with a scale for each row: one read of x, which stays in
// registers between its maximum and its rounding.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "chunk.cuh"
#include "e4m3.cuh"
#include "once_per_device.h"
#include "quantize.h"

namespace jaxfp8 {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kMaxKept = 8;  // 16-byte chunks of x that one thread holds
constexpr int kManyRows = 512;

// Block (threads, rows): each row of x has its own `threads`, a multiple of the warp.
// NOTES: kKept chunks a thread stay in registers; kKept = 0 is for rows beyond 1024 threads of
// kMaxKept chunks, read twice.
template <class T, Load kLoad, int kKept>
__global__ void __launch_bounds__(kMaxThreads)
    quantize_rows(T const* __restrict__ x, float const* __restrict__ x_scale,
                  uint8_t* __restrict__ q, float* __restrict__ scale, int m, int k, int k_pad,
                  RowClasses classes, bool lets_next_start) {
  // The GEMM behind waits for this grid's end before it reads. Without effect unless it was launched
  // as a dependent.
  if (lets_next_start) asm volatile("griddepcontrol.launch_dependents;");
  constexpr int kSize = Chunk<T>::kSize;
  int const row_index = blockIdx.x * blockDim.y + threadIdx.y;
  bool const active = row_index < m;
  T const* row = x + static_cast<int64_t>(active ? row_index : 0) * k;
  int const step = blockDim.x * kSize;
  int const start = threadIdx.x * kSize;
  bool const shifted =  // the same for all threads of a row, and so of a warp
      kLoad == Load::k8Bytes && reinterpret_cast<uintptr_t>(row) % 16 != 0;

  Chunk<T> kept[kKept > 0 ? kKept : 1];
  Amax<T> chunk_amax;
  if constexpr (kKept > 0) {
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      kept[i] = load_chunk<T, kLoad>(row, start + i * step, k, shifted);
    }
    if (shifted) {
#pragma unroll
      for (int i = 0; i < kKept; ++i) kept[i] = shift(kept[i], row, start + i * step, k);
    }
#pragma unroll
    for (int i = 0; i < kKept; ++i) chunk_amax.add(kept[i]);
  } else if (x_scale == nullptr) {
    for (int at = start; at < k; at += step) {
      chunk_amax.add(load_chunk<T, kLoad>(row, at, k, false));
    }
  }

  bool const is_static = x_scale != nullptr;
  float row_scale;
  if (is_static) {
    row_scale = *x_scale;
  } else {
    __shared__ uint32_t warp_amax[kMaxThreads / 32];
    uint32_t amax = __reduce_max_sync(0xffffffffu, chunk_amax.float_bits());
    int const warps = blockDim.x / 32;
    uint32_t* mine = warp_amax + threadIdx.y * warps;
    if (warps > 1) {
      if (threadIdx.x % 32 == 0) mine[threadIdx.x / 32] = amax;
      __syncthreads();
      int const lane = threadIdx.x % 32;
      amax = __reduce_max_sync(0xffffffffu, lane < warps ? mine[lane] : 0u);
    }
    row_scale = scale_of_amax(__uint_as_float(amax));
  }
  float const reciprocal = __fdiv_rn(1.f, row_scale);
  if (!active) return;
  int place = row_index;
  if (classes.count > 1) {
    int const rows = (m + classes.count - 1) / classes.count;
    place = row_index % classes.count * classes.factor % classes.count * rows +
            row_index / classes.count;
  }
  if (threadIdx.x == 0) scale[place] = row_scale;

  uint8_t* to = q + static_cast<int64_t>(place) * k_pad;
  auto const store = [&](Chunk<T> const& chunk, int at) {
    if (is_static) {
      store_chunk<true>(chunk, reciprocal, k - at, to + at);
    } else {
      store_chunk<false>(chunk, reciprocal, k - at, to + at);
    }
  };
  if constexpr (kKept > 0) {
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      int const at = start + i * step;
      if (at < k_pad) store(kept[i], at);
    }
  } else {
    for (int at = start; at < k_pad; at += step) store(load_chunk<T, kLoad>(row, at, k, false), at);
  }
}

template <class T>
using QuantizeKernel = void (*)(T const*, float const*, uint8_t*, float*, int, int, int, RowClasses,
                                bool);

template <class T, Load kLoad>
QuantizeKernel<T> pick_kept(int kept) {
  switch (kept) {
    case 1: return quantize_rows<T, kLoad, 1>;
    case 2: return quantize_rows<T, kLoad, 2>;
    case 4: return quantize_rows<T, kLoad, 4>;
    case 8: return quantize_rows<T, kLoad, 8>;
    default: return quantize_rows<T, kLoad, 0>;
  }
}

template <class T>
QuantizeKernel<T> pick_load(Load load, int kept) {
  switch (load) {
    case Load::k16Bytes: return pick_kept<T, Load::k16Bytes>(kept);
    case Load::k8Bytes: return pick_kept<T, Load::k8Bytes>(kept);
    default: return pick_kept<T, Load::kElements>(kept);
  }
}

template <class T>
char const* launch(QuantizeProblem const& p) {
  auto const pitch = static_cast<uint64_t>(p.k) * sizeof(T) | reinterpret_cast<uintptr_t>(p.x);
  int const chunks = (p.k_pad + Chunk<T>::kSize - 1) / Chunk<T>::kSize;
  // NOTES: few rows want all threads on each, for the latency. Many rows want chunks in flight and
  // blocks small enough that others load while one waits at its barrier: with two chunks a thread, of
  // 32 registers, a multiprocessor is full. 4096x14336 takes 49.4 us with two and 70.8 with four (57
  // registers), 4096x4096 13.7 and 18.6, 4096x1280 4.95 and 5.73. Shifted chunks wait for each other:
  // 1024x3420 takes 4.24 and 3.90, 4096x3420 12.3 and 12.0 (H200, 2026-11-24, bf16).
  int kept = p.m < kManyRows ? 1 : pitch % 16 == 0 ? 2 : 4;
  while (kept <= kMaxKept && kMaxThreads * kept < chunks) kept *= 2;
  // A row that is read twice is not shifted.
  Load const load = pitch % 16 == 0                       ? Load::k16Bytes
                    : pitch % 8 == 0 && kept <= kMaxKept ? Load::k8Bytes
                                                          : Load::kElements;
  int const shares = kept <= kMaxKept ? (chunks + kept - 1) / kept : kMaxThreads;
  int const threads = std::min((shares + 31) / 32 * 32, kMaxThreads);
  int const rows = std::max(1, 256 / threads);
  auto* kernel = pick_load<T>(load, kept <= kMaxKept ? kept : 0);
  kernel<<<(p.m + rows - 1) / rows, dim3(threads, rows), 0, p.stream>>>(
      static_cast<T const*>(p.x), p.x_scale, static_cast<uint8_t*>(p.q), p.scale, p.m, p.k,
      p.k_pad, p.classes, p.lets_next_start);
  cudaError_t const status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

template <class T>
cudaError_t load_modules() {
  for (Load load : {Load::k16Bytes, Load::k8Bytes, Load::kElements}) {
    for (int kept : {0, 1, 2, 4, 8}) {
      cudaFuncAttributes attributes;
      cudaError_t const status = cudaFuncGetAttributes(
          &attributes, reinterpret_cast<void const*>(pick_load<T>(load, kept)));
      if (status != cudaSuccess) return status;
    }
  }
  return cudaSuccess;
}

char const* load_all_modules() {
  for (cudaError_t status :
       {load_modules<__nv_bfloat16>(), load_modules<__half>(), load_modules<float>()}) {
    if (status != cudaSuccess) return cudaGetErrorString(status);
  }
  return nullptr;
}

}  // namespace

char const* quantize_prepare() {
  static OncePerDevice once;
  return once.call(load_all_modules);
}

char const* quantize_launch(QuantizeProblem const& problem) {
  switch (problem.in) {
    case In::kBF16: return launch<__nv_bfloat16>(problem);
    case In::kF16: return launch<__half>(problem);
    default: return launch<float>(problem);
  }
}

}  // namespace jaxfp8
