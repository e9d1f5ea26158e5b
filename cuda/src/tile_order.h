// In which order the tiles of a product are computed.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cutlass/fast_math.h"

namespace jaxfp8 {

// Clusters of tiles, along the shorter side of the product first, so that those at work at one time
// share what is read of the longer (L2). Where a row of them is long, several rows are walked
// together, so that they share what is read of the shorter as well; where what a row reads outgrows
// the L2, as many as make those at work at one time a square. One batch follows the other. The
// resident clusters take them in turn.
//
// NOTES: together from 40 tiles in a row on: there it took 0.987 of the time in geometric mean
// (0.91 to 1.05), on shorter rows 1.006 (0.93 to 1.08). H200, 2026-11-22, Pingpong kernels, M of
// 3000 to 8192. A square of 12 tiles: 8192x8192x8192, promoted 256x128, 0.97 and 0.98 of the time (two
// runs), 4096x8192x8192, 128x128 1x2, 0.93, others 0.99 to 1.01; where a row reads less than 32 MB up
// to 1.02 (H200, 2026-11-30).
struct TileOrder {
  struct Tile {
    int m, n, batch;
  };
  static constexpr int kLongRow = 40, kTogether = 4, kSquare = 12;  // tiles of 128x128
  static constexpr int64_t kKept = 32 << 20;  // bytes that the L2 keeps of what a row reads

  int clusters = 0;  // of all batches
  bool along_m = false;
  int rows = 0;    // a row of clusters runs along the shorter side
  int height = 1;  // of a group of rows
  cutlass::FastDivmod a_batch, a_group, a_row;

  TileOrder() = default;
  // A product of m x n x k, in clusters of so many tiles each.
  TileOrder(int m, int n, int k, int batches, int tile_m, int tile_n, int cluster_m, int cluster_n) {
    auto const parts = [](int size, int part) { return (size + part - 1) / part; };
    int const m_clusters = parts(m, tile_m * cluster_m), n_clusters = parts(n, tile_n * cluster_n);
    clusters = m_clusters * n_clusters * batches;
    along_m = n_clusters > m_clusters;
    rows = along_m ? n_clusters : m_clusters;
    int const row = along_m ? m_clusters : n_clusters;
    int const cluster = along_m ? cluster_n : cluster_m, tile = along_m ? tile_n : tile_m;
    if (int64_t{along_m ? m : n} * k >= kKept) {
      height = kSquare * 128 / (tile * cluster);
    } else if (std::min(m_clusters * cluster_m, n_clusters * cluster_n) >= kLongRow) {
      height = kTogether;
    }
    height = std::min(height, rows);
    a_batch = cutlass::FastDivmod(m_clusters * n_clusters);
    a_group = cutlass::FastDivmod(row * height);
    a_row = cutlass::FastDivmod(row);
  }

  CUTLASS_DEVICE Tile at(int cluster) const {
    int batch = 0, row, place;
    if (clusters != a_batch.divisor) a_batch(batch, cluster, cluster);
    if (height == 1) {
      a_row(row, place, cluster);
    } else {
      int group;
      a_group(group, place, cluster);
      int const together = min(height, rows - group * height);
      row = group * height + place % together;
      place /= together;
    }
    return along_m ? Tile{place, row, batch} : Tile{row, place, batch};
  }
};

}  // namespace jaxfp8
