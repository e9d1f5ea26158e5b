// A piece of a result in shared memory, as TMA and plain stores read it.
#pragma once

#include <algorithm>
#include <numeric>

#include "cute/tensor.hpp"
#include "cutlass/array.h"
#include "cutlass/cuda_host_adapter.hpp"
#include "cutlass/numeric_conversion.h"
#include "elementwise.cuh"

namespace jaxfp8 {

// Into boxes of how many bytes a row is cut: of a multiple of 128 so many, which TMA swizzles, as
// it does 64 and 32; else the widest of which 16 bytes at one place of 8 rows meet in the same
// banks twice at most (160 for 80 features, where a swizzle would make five boxes).
constexpr int box_bytes(int row) {
  if (row % 128 == 0) return 128;
  int box = std::min(row, 256);
  while (row % box != 0 || ((box & (box - 1)) != 0 && std::gcd(box / 16, 8) > 2)) box -= 16;
  return box;
}
static_assert(box_bytes(256) == 128 && box_bytes(64) == 64 && box_bytes(320) == 160 &&
              box_bytes(96) == 96 && box_bytes(192) == 96);

// 64 rows of a tile and kColumns of its columns, which a warpgroup stages at once, as tokens of so
// many features (swapped, the tile's rows are the features). One box lies behind the other. Within
// a box that TMA swizzles, 16 bytes lie where the exclusive or of their number and the row's says.
template <class Element, bool kSwapped, int kColumns>
struct Staging {
  static constexpr int kSize = sizeof(Element);
  static constexpr int kTokens = kSwapped ? kColumns : 64;
  static constexpr int kFeatures = kSwapped ? 64 : kColumns;
  static constexpr int kRowBytes = box_bytes(kFeatures * kSize);
  static constexpr int kBox = kRowBytes / kSize;  // features
  static constexpr int kBytes = kTokens * kFeatures * kSize;
  // What repeats in the swizzle: 8 rows of 128 bytes.
  static constexpr int kAlignment = 1024;
  static_assert(kBytes % kAlignment == 0);
  static constexpr CUtensorMapSwizzle kSwizzle = kRowBytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                                 : kRowBytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                 : kRowBytes == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                                   : CU_TENSOR_MAP_SWIZZLE_NONE;

  // For the exclusive or with the place of bytes in their row.
  static CUTLASS_DEVICE int swizzle(int token) {
    if (kSwizzle == CU_TENSOR_MAP_SWIZZLE_NONE) return 0;
    return (token * kRowBytes >> 3) & (kRowBytes - 16);
  }

  // Where an element is, in bytes.
  static CUTLASS_DEVICE int at(int token, int feature) {
    int const box = feature / kBox, byte = feature % kBox * kSize;
    return box * kTokens * kRowBytes + token * kRowBytes + (byte ^ swizzle(token));
  }

  // A thread's values as the MMA leaves them: of every 8 columns, two neighbours in row
  // thread / 4 of its warp's 16, and two in the row 8 further.
  using Values = cutlass::Array<float, kColumns / 2>;

  static CUTLASS_DEVICE void put(char* staged, Values const& z, int thread) {
    int const warp = thread / 32, lane = thread % 32;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kColumns / 2; i += 2) {
      int const row = warp * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2;
      if constexpr (kSwapped) {
        *reinterpret_cast<Element*>(staged + at(column, row)) = Element(z[i]);
        *reinterpret_cast<Element*>(staged + at(column + 1, row)) = Element(z[i + 1]);
      } else {
        using Bits = cute::uint_bit_t<16 * kSize>;
        auto const pair = cutlass::NumericArrayConverter<Element, float, 2>{}({z[i], z[i + 1]});
        *reinterpret_cast<Bits*>(staged + at(row, column)) = reinterpret_cast<Bits const&>(pair);
      }
    }
  }

  // The same of results of 16 bits, rounded and in pairs; four matrices of 8x8 at a time.
  using Pairs = cutlass::Array<uint32_t, kColumns / 4>;

  static CUTLASS_DEVICE void put(char* staged, Pairs const& z, int thread) {
    using Copy = cute::conditional_t<kSwapped, cute::SM90_U16x8_STSM_T, cute::SM90_U32x4_STSM_N>;
    by_matrices(staged, thread, [&](int i, cute::uint128_t& to) {
      Copy::copy(z[4 * i], z[4 * i + 1], z[4 * i + 2], z[4 * i + 3], to);
    });
  }

  // What is staged there, 16 bits each, is added to a thread's values.
  static CUTLASS_DEVICE void add(char* staged, Values& z, int thread, bool float16) {
    using Copy = cute::conditional_t<kSwapped, cute::SM75_U16x8_LDSM_T, cute::SM75_U32x4_LDSM_N>;
    by_matrices(staged, thread, [&](int i, cute::uint128_t const& from) {
      uint32_t pairs[4];
      Copy::copy(from, pairs[0], pairs[1], pairs[2], pairs[3]);
      CUTLASS_PRAGMA_UNROLL
      for (int j = 0; j < 4; ++j) {
        auto const two = from_16_bits(pairs[j], float16);
        z[8 * i + 2 * j] += two[0], z[8 * i + 2 * j + 1] += two[1];
      }
    });
  }

  // `move(i, address)` for each four matrices i of a thread's pairs; a lane has the address of one
  // row of one matrix.
  template <class Move>
  static CUTLASS_DEVICE void by_matrices(char* staged, int thread, Move const& move) {
    static_assert(kSize == 2 && kRowBytes >= 32 && kColumns % 16 == 0);
    int const warp = thread / 32, lane = thread % 32;
    int const token = kSwapped ? lane / 16 * 8 + lane % 8 : warp * 16 + lane % 16;
    int const byte = kSwapped ? warp * 32 + lane / 8 % 2 * 16 : lane / 16 * 16;
    char* const row = staged + token * kRowBytes;
    int const place = byte ^ swizzle(token);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kColumns / 16; ++i) {
      int const along = i * 32 % kRowBytes, box = i * 32 / kRowBytes;
      char* const here = kSwapped ? row + place + i * 16 * kRowBytes
                                  : row + (along ^ place) + box * kTokens * kRowBytes;
      move(i, *reinterpret_cast<cute::uint128_t*>(here));
    }
  }

  // What TMA is told of a row-major array, `pitch` elements from one row to the next; null, or why
  // it cannot be described.
  static char const* describe(cute::TmaDescriptor* tensor, Element const* array, int64_t pitch,
                              int tokens, int features) {
    constexpr auto kType = kSize == 4   ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                           : kSize == 2 ? CU_TENSOR_MAP_DATA_TYPE_UINT16
                                        : CU_TENSOR_MAP_DATA_TYPE_UINT8;
    cuuint64_t const sizes[] = {static_cast<cuuint64_t>(features),
                                static_cast<cuuint64_t>(tokens)};
    cuuint64_t const strides[] = {static_cast<cuuint64_t>(pitch) * kSize};
    cuuint32_t const box[] = {kBox, kTokens}, steps[] = {1, 1};
    CUresult const result = CUTLASS_CUDA_DRIVER_WRAPPER_CALL(cuTensorMapEncodeTiled)(
        tensor, kType, 2, const_cast<Element*>(array), sizes, strides, box, steps,
        CU_TENSOR_MAP_INTERLEAVE_NONE, kSwizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? nullptr : "a result or residual has no TMA descriptor";
  }
};

}  // namespace jaxfp8
