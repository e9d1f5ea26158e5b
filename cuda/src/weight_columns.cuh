// A loaded [K, N] weight -> e4m3, K-major, padded. An output feature is a column: a cluster of
// blocks has a strip of columns, and the blocks take its tiles of K in turn and turn them in shared
// memory. To measure and write in one launch leaves much of the second read to the caches.
#pragma once

#include <cooperative_groups.h>

#include "chunk.cuh"
#include "e4m3.cuh"
#include "weight.h"

namespace jaxfp8 {

namespace cg = cooperative_groups;

constexpr int kThreadsOfTile = 256;
constexpr int kStrip = 64;        // columns of a cluster: 128 bytes of 16-bit numbers
constexpr int kCluster = 8;       // blocks of a cluster, the most that every GPU grants
constexpr int kChunksOfTile = 4;  // of a thread
// Tiles of a block that are on their way or in use. Of [K, N], 16 x 4096 x 4096, us to measure, to
// write, to do both (H200, 2026-11-23): without reading ahead 158, 305, 351; 2 stages 148, 199,
// 288; 3 stages 158, 202, 272; a copy of as many bytes as are written and read takes 132, 199, 199.
constexpr int kStages = 2;

// The maxima of |x| down as many columns as a chunk has.
template <class T>
struct ColumnAmax {
  uint32_t words[4] = {};
  __device__ void add(Chunk<T> const& chunk) {
    auto const* from = reinterpret_cast<uint32_t const*>(chunk.v);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 2) {
        words[i] = __vmaxu2(words[i], from[i] & 0x7fff7fffu);
      } else {
        words[i] = max(words[i], from[i] & 0x7fffffffu);
      }
    }
  }
  __device__ uint32_t float_bits(int column) const {
    return __float_as_uint(to_float(reinterpret_cast<T const*>(words)[column])) & 0x7fffffffu;
  }
};

// Four numbers that follow each other along K, as a word.
__device__ inline uint32_t to_e4m3(float a, float b, float c, float d) {
  uint32_t const low = __nv_cvt_float2_to_fp8x2({a, b}, __NV_SATFINITE, __NV_E4M3);
  uint32_t const high = __nv_cvt_float2_to_fp8x2({c, d}, __NV_SATFINITE, __NV_E4M3);
  return low | high << 16;
}

// A thread's share of the tiles that its block takes, read ahead. Nobody else reads the thread's
// part of `stages`, so no barrier is needed.
template <class T, int kBytes>
struct Tiles {
  static constexpr int kSize = Chunk<T>::kSize;
  static constexpr int kLanes = kStrip / kSize;      // threads along N
  static constexpr int kGroups = kThreadsOfTile / kLanes;  // threads along K, of four rows each
  static constexpr int kTile = kChunksOfTile * kGroups;
  // cp.async has no copy of 2 bytes.
  static constexpr bool kAhead = kBytes >= 4;
  static constexpr int kStageBytes = kAhead ? kStages * kChunksOfTile * kThreadsOfTile * 16 : 0;

  T const* w;
  int k, n, column, row;  // of the thread's first chunk in tile 0
  uint4* stages;          // [kStages][kChunksOfTile][kThreadsOfTile]

  __device__ uint4* slot(int stage, int i) const {
    return stages + (stage * kChunksOfTile + i) * kThreadsOfTile + threadIdx.x;
  }
  __device__ void fetch(int tile, int stage) const {
    if constexpr (kAhead) {
#pragma unroll
      for (int i = 0; i < kChunksOfTile; ++i) {
        int const at = tile * kTile + row + i;
        auto const to = static_cast<uint32_t>(__cvta_generic_to_shared(slot(stage, i)));
#pragma unroll
        for (int j = 0; j < 16; j += kBytes) {
          int const in_row = column + j / sizeof(T);
          bool const inside = at < k && in_row < n;
          T const* from = w + (inside ? static_cast<int64_t>(at) * n + in_row : 0);
          copy_ahead(to + j, from, inside ? kBytes : 0);
        }
      }
    }
  }
  // `bytes` of kBytes, and zeros; past the L1 where it can be (16 bytes alone).
  __device__ static void copy_ahead(uint32_t to, T const* from, int bytes) {
    if constexpr (kBytes == 16) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
                   : "memory");
    } else {
      asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from),
                   "n"(kBytes), "r"(bytes)
                   : "memory");
    }
  }
  __device__ void take(int tile, int stage, Chunk<T> (&chunks)[kChunksOfTile]) const {
#pragma unroll
    for (int i = 0; i < kChunksOfTile; ++i) {
      if constexpr (kAhead) {
        reinterpret_cast<uint4&>(chunks[i]) = *slot(stage, i);
      } else {
        int const at = tile * kTile + row + i;
        chunks[i] = load_chunk<kBytes>(w + static_cast<int64_t>(at) * n, column, at < k ? n : 0);
      }
    }
  }
  // use(tile, chunks) for `count` tiles from `first` on, `step` apart.
  template <class Use>
  __device__ void for_each(int first, int step, int count, Use use) const {
    for (int i = 0; i < kStages - 1; ++i) {
      if (i < count) fetch(first + i * step, i);
      asm volatile("cp.async.commit_group;");
    }
    for (int i = 0; i < count; ++i) {
      int const ahead = i + kStages - 1;
      if (ahead < count) fetch(first + ahead * step, ahead % kStages);
      asm volatile("cp.async.commit_group;");
      asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 1) : "memory");
      Chunk<T> chunks[kChunksOfTile];
      take(first + i * step, i % kStages, chunks);
      use(first + i * step, chunks);
    }
  }
};

// Block (x: strip and rank in its cluster; y: matrix of the stack; z: weight).
template <class T, int kBytes>
__global__ void __launch_bounds__(kThreadsOfTile)
    weight_columns(__grid_constant__ WeightProblem const p) {
  using Mine = Tiles<T, kBytes>;
  constexpr int kSize = Mine::kSize, kLanes = Mine::kLanes, kGroups = Mine::kGroups;
  constexpr int kTile = Mine::kTile;
  constexpr int kPitch = kGroups + 1;  // in words: fewer bank conflicts
  extern __shared__ uint4 stages[];
  __shared__ uint32_t amax[kStrip];
  __shared__ float reciprocals[kStrip];
  __shared__ uint32_t turned[2][kStrip * kPitch];

  cg::cluster_group const cluster = cg::this_cluster();
  int const rank = cluster.block_rank();
  int const strip = blockIdx.x / kCluster * kStrip;
  int const lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  int const tiles = (p.k_pad + kTile - 1) / kTile;
  int const count = rank < tiles ? (tiles - 1 - rank) / kCluster + 1 : 0;
  int const which = blockIdx.z;
  Mine const mine{static_cast<T const*>(p.w[which]) + static_cast<int64_t>(blockIdx.y) * p.k * p.n,
                  p.k, p.n, strip + lane * kSize, kChunksOfTile * group, stages};

  uint32_t measured = 0;  // of column strip + threadIdx.x, in the first kStrip threads
  if (p.given == nullptr) {
    if (threadIdx.x < kStrip) amax[threadIdx.x] = 0;
    ColumnAmax<T> largest;
    mine.for_each(rank, kCluster, count, [&](int, Chunk<T>(&chunks)[kChunksOfTile]) {
#pragma unroll
      for (auto const& chunk : chunks) largest.add(chunk);
    });
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kSize; ++i) atomicMax(amax + lane * kSize + i, largest.float_bits(i));
    cluster.sync();
    if (threadIdx.x < kStrip) {
#pragma unroll
      for (int block = 0; block < kCluster; ++block) {
        measured = max(measured, *cluster.map_shared_rank(amax + threadIdx.x, block));
      }
    }
    cluster.sync();  // a block's shared memory must not go while others read it
  }
  if (threadIdx.x < kStrip) {
    int const n = strip + threadIdx.x;
    int64_t const in_all = (static_cast<int64_t>(which) * p.stack + blockIdx.y) * p.n + n;
    int64_t const padded = static_cast<int64_t>(blockIdx.y) * p.n_pad + n;
    float scale = 1.f;
    if (n < p.n) {
      scale = p.given != nullptr ? p.given[in_all] : scale_of_amax(__uint_as_float(measured));
    }
    if (rank == 0) {
      if (p.measured != nullptr) {
        if (n < p.n) p.measured[in_all] = scale;
      } else if (n < p.n_pad) {
        p.scale[which][padded] = scale;
      }
    }
    reciprocals[threadIdx.x] = __fdiv_rn(1.f, scale);
  }
  if (p.measured != nullptr) return;
  __syncthreads();
  float reciprocal[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) reciprocal[i] = reciprocals[lane * kSize + i];

  auto* q =
      static_cast<uint8_t*>(p.q[which]) + static_cast<int64_t>(blockIdx.y) * p.n_pad * p.k_pad;
  int buffer = 0;
  // NOTES: backwards, because what was measured last is still in a cache.
  mine.for_each(rank + (count - 1) * kCluster, -kCluster, count,
                [&](int tile, Chunk<T>(&chunks)[kChunksOfTile]) {
    int const valid = p.k - (tile * kTile + kChunksOfTile * group);
    // 0 past K, also where the scale is NaN.
    uint32_t const mask = valid >= 4 ? ~0u : valid <= 0 ? 0u : (1u << 8 * valid) - 1;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      auto const scaled = [&](int row) {
        return __fmul_rn(to_float(chunks[row].v[i]), reciprocal[i]);
      };
      turned[buffer][(lane * kSize + i) * kPitch + group] =
          to_e4m3(scaled(0), scaled(1), scaled(2), scaled(3)) & mask;
    }
    __syncthreads();
    constexpr int kWide = 4;  // words of a store
#pragma unroll
    for (int i = threadIdx.x; i < kStrip * kGroups / kWide; i += kThreadsOfTile) {
      int const column = i / (kGroups / kWide), word = i % (kGroups / kWide) * kWide;
      int const n = strip + column, k = tile * kTile + 4 * word;
      uint32_t const* from = turned[buffer] + column * kPitch + word;
      if (n < p.n_pad && k < p.k_pad) {
        *reinterpret_cast<uint4*>(q + static_cast<int64_t>(n) * p.k_pad + k) = {from[0], from[1],
                                                                               from[2], from[3]};
      }
    }
    buffer ^= 1;
  });
}

}  // namespace jaxfp8
