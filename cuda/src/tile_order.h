// In which order the tiles of a product are computed.
#pragma once

#include "cutlass/fast_math.h"

namespace jaxfp8 {

// Clusters of tiles, along the shorter side of the product first, so that those at work at one time
// share what is read of the longer (L2). One batch follows the other. The resident clusters take
// them in turn.
struct TileOrder {
  struct Tile {
    int m, n, batch;
  };

  int clusters = 0;  // of all batches
  bool along_m = false;
  cutlass::FastDivmod a_batch, a_row;  // a row of clusters runs along the shorter side

  TileOrder() = default;
  TileOrder(int m, int n, int batches)
      : clusters(m * n * batches), along_m(n > m), a_batch(m * n), a_row(along_m ? m : n) {}

  CUTLASS_DEVICE Tile at(int cluster) const {
    int batch = 0, row, place;
    if (clusters != a_batch.divisor) a_batch(batch, cluster, cluster);
    a_row(row, place, cluster);
    return along_m ? Tile{place, row, batch} : Tile{row, place, batch};
  }
};

}  // namespace jaxfp8
