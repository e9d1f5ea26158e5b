// In which order the tiles of a product are computed.
#pragma once

#include <algorithm>

#include "cutlass/fast_math.h"

namespace jaxfp8 {

// Clusters of tiles, along the shorter side of the product first, so that those at work at one time
// share what is read of the longer (L2). Where a row of them is long, several rows are walked
// together, so that they share what is read of the shorter as well. One batch follows the other.
// The resident clusters take them in turn.
//
// NOTES: together from 40 tiles in a row on: there it took 0.987 of the time in geometric mean
// (0.91 to 1.05), on shorter rows 1.006 (0.93 to 1.08). H200, 2026-11-22, Pingpong kernels, M of
// 3000 to 8192.
struct TileOrder {
  struct Tile {
    int m, n, batch;
  };
  static constexpr int kLongRow = 40, kTogether = 4;

  int clusters = 0;  // of all batches
  bool along_m = false, together = false;
  int rows = 0;  // a row of clusters runs along the shorter side
  cutlass::FastDivmod a_batch, a_group, a_row;

  TileOrder() = default;
  // m and n in clusters, of so many tiles each.
  TileOrder(int m, int n, int batches, int cluster_m, int cluster_n)
      : clusters(m * n * batches),
        along_m(n > m),
        together(std::min(m * cluster_m, n * cluster_n) >= kLongRow),
        rows(along_m ? n : m),
        a_batch(m * n),
        a_group((along_m ? m : n) * kTogether),
        a_row(along_m ? m : n) {}

  CUTLASS_DEVICE Tile at(int cluster) const {
    int batch = 0, row, place;
    if (clusters != a_batch.divisor) a_batch(batch, cluster, cluster);
    if (!together) {
      a_row(row, place, cluster);
    } else {
      int group;
      a_group(group, place, cluster);
      int const height = min(kTogether, rows - group * kTogether);
      row = group * kTogether + place % height;
      place /= height;
    }
    return along_m ? Tile{place, row, batch} : Tile{row, place, batch};
  }
};

}  // namespace jaxfp8
