// In which order the tiles of a product are computed.
#pragma once

#include <algorithm>

#include "cutlass/fast_math.h"

namespace jaxfp8 {

// Clusters of tiles, along the shorter side of the product first, so that those at work at one time
// share what is read of the longer; `swizzle` rows of them walked together share more of the shorter
// (L2). One batch follows the other. The resident clusters take them in turn.
struct TileOrder {
  struct Tile {
    int m, n, batch;
  };

  int clusters = 0;  // of all batches
  bool along_m = false;
  int swizzle = 1, rows = 0;  // a row of clusters runs along the shorter side
  cutlass::FastDivmod a_batch, a_group, a_row;

  TileOrder() = default;
  TileOrder(int m, int n, int batches, int swizzle_wanted) {
    along_m = n > m;
    int const shorter = along_m ? m : n;
    rows = along_m ? n : m;
    swizzle = swizzle_wanted >= 4 && std::min(m, n) >= 3 ? 4 : 1;
    clusters = m * n * batches;
    a_batch = cutlass::FastDivmod(m * n);
    a_group = cutlass::FastDivmod(shorter * swizzle);
    a_row = cutlass::FastDivmod(shorter);
  }

  CUTLASS_DEVICE Tile at(int cluster) const {
    int batch = 0, group, row, place;
    if (clusters != a_batch.divisor) a_batch(batch, cluster, cluster);
    if (swizzle == 1) {
      a_row(row, place, cluster);
    } else {
      a_group(group, place, cluster);
      int const height = min(swizzle, rows - group * swizzle);
      row = group * swizzle + place % height;
      place /= height;
    }
    return along_m ? Tile{place, row, batch} : Tile{row, place, batch};
  }
};

}  // namespace jaxfp8
