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

// Registers a thread for so many chunks, 4 words each.
// NOTES: left to itself ptxas converts chunks before the row's maximum is known, and takes up to
// 64. Then a multiprocessor holds a block or two of a long row, and idles at their barriers:
// 4096x18944 took 78.7 us with 4 chunks a thread and takes 56.2, 4096x11008 39.5 and 33.7,
// 1024x14336 12.9 and 12.0 (H200, 2026-12-01). Rows read by 4 or 2 bytes need more, or spill.
template <int kBytes, int kKept>
constexpr int kRegisters = kBytes < 4 || kKept > 5 ? 64
                           : kKept > 3             ? (kBytes < 8 ? 48 : 40)
                                                   : 32;

// Block (threads, rows): each row of x has its own `threads`, a multiple of the warp.
// NOTES: kKept chunks a thread stay in registers; kKept = 0 is for rows beyond 1024 threads of
// 8 chunks, read twice.
template <class T, int kBytes, int kKept>
__global__ void __maxnreg__((kRegisters<kBytes, kKept>))
    quantize_rows(T const* __restrict__ x, float const* __restrict__ x_scale,
                  uint8_t* __restrict__ q, float* __restrict__ scale, int m, int k, int k_pad,
                  RowClasses classes, bool lets_next_start) {
  // The GEMM behind waits for this grid's end before it reads. Without effect unless it was
  // launched as a dependent.
  if (lets_next_start) asm volatile("griddepcontrol.launch_dependents;");
  constexpr int kSize = Chunk<T>::kSize;
  int const row_index = blockIdx.x * blockDim.y + threadIdx.y;
  bool const active = row_index < m;
  T const* row = x + static_cast<int64_t>(active ? row_index : 0) * k;
  int const step = blockDim.x * kSize;
  int const start = threadIdx.x * kSize;

  Chunk<T> kept[kKept > 0 ? kKept : 1];
  Amax<T> chunk_amax;
  if constexpr (kKept > 0) {
#pragma unroll
    for (int i = 0; i < kKept; ++i) kept[i] = load_chunk<kBytes>(row, start + i * step, k);
#pragma unroll
    for (int i = 0; i < kKept; ++i) chunk_amax.add(kept[i]);
  } else if (x_scale == nullptr) {
    for (int at = start; at < k; at += step) chunk_amax.add(load_chunk<kBytes>(row, at, k));
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
      store_chunk<true>(chunk, reciprocal, at, k, k_pad, to);
    } else {
      store_chunk<false>(chunk, reciprocal, at, k, k_pad, to);
    }
  };
  if constexpr (kKept > 0) {
#pragma unroll
    for (int i = 0; i < kKept; ++i) store(kept[i], start + i * step);
  } else {
    for (int base = 0; base < k_pad; base += step) {
      store(load_chunk<kBytes>(row, base + start, k), base + start);
    }
  }
}

template <class T>
using QuantizeKernel = void (*)(T const*, float const*, uint8_t*, float*, int, int, int, RowClasses,
                                bool);

template <class T, int kBytes>
QuantizeKernel<T> pick_kept(int kept) {
  switch (kept) {
    case 1: return quantize_rows<T, kBytes, 1>;
    case 2: return quantize_rows<T, kBytes, 2>;
    case 3: return quantize_rows<T, kBytes, 3>;
    case 4: return quantize_rows<T, kBytes, 4>;
    case 5: return quantize_rows<T, kBytes, 5>;
    case 8: return quantize_rows<T, kBytes, 8>;
    default: return quantize_rows<T, kBytes, 0>;
  }
}

template <class T>
QuantizeKernel<T> pick(int bytes, int kept) {
  return by_bytes<T>(bytes, [=](auto constant) { return pick_kept<T, constant.value>(kept); });
}

int whole_warps(int threads) { return (threads + 31) / 32 * 32; }

// How many 16-byte chunks of a row each of its threads holds; 0: the row is read twice.
//
// NOTES: few rows want threads on each, for the latency, but not all that a block may have: with
// 256 of them 16x4096 takes 1.59 us and with 512 1.60, 256x8192 2.68 and with 1024 3.10. Many short
// rows want no thread idle: with 5 a thread, a warp to a row, 4096x1280 takes 3.72 us, with 4 5.25,
// with 2 4.70. Longer ones want several blocks at work on a multiprocessor: with 5 512x13824 takes
// 6.07 and with 4 6.39, 1024x29568 24.3 and 28.2. Of 19 widths from 1280 to 29568 and M of 512 to
// 4096 the choice takes 1.007 of the time of the best of 1 to 8 in geometric mean, 1.067 at worst
// (2048x3420; H200, 2026-12-01, bf16, x in L2 where it fits). Tried, of no use: rows brought into
// shared memory by the bulk copy engine, two to four ahead of their warps (4096x14336 46.0,
// 4096x1280 5.5).
int chunks_kept(int m, int chunks, int bytes) {
  constexpr int kManyRows = 512;
  auto const threads = [&](int kept) { return whole_warps((chunks + kept - 1) / kept); };
  if (m < kManyRows && chunks <= 4 * kMaxThreads) return chunks <= 256 ? 1 : chunks <= 640 ? 2 : 4;
  if (bytes < 4 && chunks <= 2 * kMaxThreads) return 2;
  if (chunks <= 512) {
    int best = 3;
    for (int kept : {5, 4, 2}) {
      if (kept * threads(kept) < best * threads(best)) best = kept;
    }
    return best;
  }
  if (chunks <= 1536) return 4;
  return chunks <= 5 * kMaxThreads ? 5 : chunks <= 8 * kMaxThreads ? 8 : 0;
}

template <class T>
char const* launch(QuantizeProblem const& p) {
  int const bytes = bytes_at_once(static_cast<uint64_t>(p.k) * sizeof(T) |
                                  reinterpret_cast<uintptr_t>(p.x));
  int const chunks = (p.k_pad + Chunk<T>::kSize - 1) / Chunk<T>::kSize;
  int const kept = chunks_kept(p.m, chunks, bytes);
  int const shares = kept > 0 ? (chunks + kept - 1) / kept : kMaxThreads;
  int const threads = whole_warps(shares);
  int const rows = std::max(1, 128 / threads);
  auto* kernel = pick<T>(bytes, kept);
  kernel<<<(p.m + rows - 1) / rows, dim3(threads, rows), 0, p.stream>>>(
      static_cast<T const*>(p.x), p.x_scale, static_cast<uint8_t*>(p.q), p.scale, p.m, p.k,
      p.k_pad, p.classes, p.lets_next_start);
  cudaError_t const status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

template <class T>
cudaError_t load_modules() {
  for (int bytes : {16, 8, 4, 2}) {
    for (int kept : {0, 1, 2, 3, 4, 5, 8}) {
      cudaFuncAttributes attributes;
      cudaError_t const status = cudaFuncGetAttributes(
          &attributes, reinterpret_cast<void const*>(pick<T>(bytes, kept)));
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
