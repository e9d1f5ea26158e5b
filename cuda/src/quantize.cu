// x -> e4m3, zero-padded to k_pad, with a scale for each row: one read of x, which stays in
// registers between its maximum and its rounding.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <initializer_list>

#include "chunk.cuh"
#include "e4m3.cuh"
#include "once_per_device.h"
#include "quantize.h"

namespace jaxfp8 {
namespace {

constexpr int kMaxThreads = 1024;

// Block (threads, rows): each row of x has its own `threads`, a multiple of the warp.
// NOTES: kKept chunks a thread stay in registers; kKept = 0 is for rows beyond 1024 threads of
// 7 chunks, read twice.
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
  bool const shifted = is_shifted<T, kLoad>(row);
  int const start = threadIdx.x * kSize - (shifted ? kSize / 2 : 0);

  Chunk<T> kept[kKept > 0 ? kKept : 1];
  Amax<T> chunk_amax;
  if constexpr (kKept > 0) {
    if (kLoad == Load::k8Bytes && row_index + 1 < m) {
#pragma unroll
      for (int i = 0; i < kKept; ++i) kept[i] = load_aligned(row, start + i * step, k);
#pragma unroll
      for (int i = 0; i < kKept; ++i) clear_outside(kept[i], start + i * step, k);
    } else {
#pragma unroll
      for (int i = 0; i < kKept; ++i) kept[i] = load_chunk<T, kLoad>(row, start + i * step, k);
    }
#pragma unroll
    for (int i = 0; i < kKept; ++i) chunk_amax.add(kept[i]);
  } else if (x_scale == nullptr) {
    for (int at = start; at < k; at += step) chunk_amax.add(load_chunk<T, kLoad>(row, at, k));
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
    // The count is a power of two, as what it divides is (RowClasses::of).
    int const last = classes.count - 1, shift = __ffs(classes.count) - 1;
    int const row_class = row_index * classes.factor & last, rows = (m + last) >> shift;
    place = row_class * rows + (row_index >> shift);
  }
  if (threadIdx.x == 0) scale[place] = row_scale;

  uint8_t* to = q + static_cast<int64_t>(place) * k_pad;
  auto const store = [&](Chunk<T> const& chunk, int at) {
    if (is_static) {
      store_chunk<true>(chunk, reciprocal, at, k, k_pad, shifted, to);
    } else {
      store_chunk<false>(chunk, reciprocal, at, k, k_pad, shifted, to);
    }
  };
  if constexpr (kKept > 0) {
#pragma unroll
    for (int i = 0; i < kKept; ++i) store(kept[i], start + i * step);
  } else {
    for (int base = 0; base < k_pad; base += step) {
      store(load_chunk<T, kLoad>(row, base + start, k), base + start);
    }
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
    case 3: return quantize_rows<T, kLoad, 3>;
    case 4: return quantize_rows<T, kLoad, 4>;
    case 5: return quantize_rows<T, kLoad, 5>;
    case 7: return quantize_rows<T, kLoad, 7>;
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

int whole_warps(int threads) { return (threads + 31) / 32 * 32; }

// How many 16-byte chunks of a row each of its threads holds; 0: the row is read twice.
//
// NOTES: few rows want threads on each, for the latency, but not all that a block may have: with 256
// of them 16x4096 takes 1.59 us and with 512 1.60, 256x8192 2.68 and with 1024 3.10. Many rows want
// no thread idle first, then chunks in flight and blocks small enough that others load while one
// waits at its barrier: with 5 a thread, a warp to a row, 4096x1280 takes 3.46 us, with 4 4.43, with 2
// 4.23; with 7 1024x14336 10.0 and with 4 11.1; with 4 4096x4096 12.4 and with 5 12.7. Rows read by 8
// bytes: 1024x3420 3.69 with 2, 3.76 with 7; 4096x3420 10.5 and 9.7. By elements 4096x3422 takes 11.5
// with 2 and 12.4 with 3 or 5 (H200, 2026-11-30, bf16, x in L2 where it fits). Tried, of no use: rows
// brought into shared memory by the bulk copy engine, two to four ahead of their warps (4096x14336
// 46.0, 4096x1280 5.5).
int chunks_kept(int m, int chunks, Load load) {
  constexpr int kManyRows = 512, kVeryMany = 2048, kWide = 1536;
  auto const threads = [&](int kept) { return whole_warps((chunks + kept - 1) / kept); };
  auto const least_idle = [&](std::initializer_list<int> by_preference) {
    int best = 0;
    for (int kept : by_preference) {
      if (threads(kept) > kMaxThreads) continue;
      if (best == 0 || kept * threads(kept) < best * threads(best)) best = kept;
    }
    return best;
  };
  if (m < kManyRows && chunks <= 4 * kMaxThreads) return chunks <= 256 ? 1 : chunks <= 640 ? 2 : 4;
  if (load == Load::kElements && chunks <= 2 * kMaxThreads) return 2;
  if (chunks >= kWide) return least_idle({7, 4, 3, 2, 5});
  return m < kVeryMany ? least_idle({4, 3, 2, 5, 7}) : least_idle({4, 3, 5, 7, 2});
}

template <class T>
char const* launch(QuantizeProblem const& p) {
  auto const pitch = static_cast<uint64_t>(p.k) * sizeof(T) | reinterpret_cast<uintptr_t>(p.x);
  int const chunks = (p.k_pad + Chunk<T>::kSize - 1) / Chunk<T>::kSize;
  Load const load = pitch % 16 == 0  ? Load::k16Bytes
                    : pitch % 8 == 0 ? Load::k8Bytes
                                     : Load::kElements;
  int const kept = chunks_kept(p.m, chunks, load);
  int const shares = kept > 0 ? (chunks + kept - 1) / kept : kMaxThreads;
  int const threads = whole_warps(shares);
  int const rows = std::max(1, 128 / threads);
  auto* kernel = pick_load<T>(load, kept);
  kernel<<<(p.m + rows - 1) / rows, dim3(threads, rows), 0, p.stream>>>(
      static_cast<T const*>(p.x), p.x_scale, static_cast<uint8_t*>(p.q), p.scale, p.m, p.k,
      p.k_pad, p.classes, p.lets_next_start);
  cudaError_t const status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

template <class T>
cudaError_t load_modules() {
  for (Load load : {Load::k16Bytes, Load::k8Bytes, Load::kElements}) {
    for (int kept : {0, 1, 2, 3, 4, 5, 7}) {
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

char const* quantize_launch(QuantizeProblem const& problem) {
  static OncePerDevice once;
  if (char const* why = once.call(load_all_modules)) return why;
  switch (problem.in) {
    case In::kBF16: return launch<__nv_bfloat16>(problem);
    case In::kF16: return launch<__half>(problem);
    default: return launch<float>(problem);
  }
}

}  // namespace jaxfp8
