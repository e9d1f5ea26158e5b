// The kernel around CUTLASS's collectives: which warp does what, and what it waits for.
#pragma once

#include "cutlass/arch/barrier.h"
#include "cutlass/arch/grid_dependency_control.h"
#include "cutlass/arch/reg_reconfig.h"
#include "cutlass/cluster_launch.hpp"
#include "cutlass/pipeline/pipeline.hpp"
#include "kernels.h"
#include "prefetch.cuh"
#include "tile_order.h"

namespace jaxfp8 {

// Warp 0 loads tiles; two warpgroups multiply. Cooperative ones share a tile and Pingpong ones take
// turns: one multiplies while the other finishes.
//
// NOTES: CUTLASS's own kernels (GemmUniversal) do the same. What is left out here is 0.7 us of each
// GEMM: 512x4096x256 takes 4.8 us where it took 5.6 (H200, 2026-11-22; clocks read along it told
// where). Their loads begin 1.2 us after the kernel does, behind the barriers of a pipeline that
// nothing uses, a scheduler of 64-bit divisions and a barrier of the whole block; here the warp
// that has made the barriers of the loads issues them at once. And an epilogue there asks for its
// scales when the product is done; here each thread has asked for them before it begins
// (Epilogue::fetch). Tried, and of no use: the first stages of the weight loaded before the wait
// for x; the kernel's parameters read at once by all warps; Cooperative warpgroups that store
// their halves in turn, so that one multiplies meanwhile (up to 12 % slower: stages that the one
// behind has yet to read are none that could be loaded for the one ahead).
//
// With `kAhead` the mainloop asks for a part of the next tile's products before a tile is stored.
template <Schedule kSchedule, class Mainloop, class Epilogue, class TileShape, class Cluster,
          int kAccumulators, bool kAhead>
struct GemmKernel {
  static constexpr bool kPingpong = kSchedule == Schedule::kPingpong;
  static constexpr int kGroups = 2;  // that multiply
  static constexpr int kGroup = 128;
  // The threads that have a tile together.
  static constexpr int kTeam = kPingpong ? kGroup : 2 * kGroup;
  static constexpr int kTeams = kPingpong ? 2 : 1;
  static constexpr int kClusterM = cute::size<0>(Cluster{}), kClusterN = cute::size<1>(Cluster{});
  static constexpr int kClusterSize = kClusterM * kClusterN;

  // For cutlass::device_kernel.
  static constexpr uint32_t MaxThreadsPerBlock = (1 + kGroups) * kGroup;
  static constexpr uint32_t MinBlocksPerMultiprocessor = 1;

  // NOTES: 384 threads get 168 registers each, which is enough for 64 accumulators; to move
  // registers from the loading warps to the others takes 200 clocks.
  static constexpr bool kMovesRegisters = kAccumulators > 64;

  using Pipeline = typename Mainloop::MainloopPipeline;
  using Shape = cute::Shape<int, int, int, int>;

  struct Params {
    typename Mainloop::Params mainloop;
    typename Epilogue::Params epilogue;
    Shape shape;
    TileOrder order;
    Prefetch prefetch;
  };

  struct SharedStorage {
    alignas(1024) typename Mainloop::TensorStorage mainloop;
    alignas(Epilogue::Staged::kAlignment) typename Epilogue::Storage epilogue;
    alignas(16) typename Pipeline::SharedStorage pipeline;
  };
  static constexpr int SharedStorageSize = sizeof(SharedStorage);
  static_assert(SharedStorageSize <= 227 * 1024, "more shared memory than a block may have");

  // Barriers: a Pingpong team's turn to multiply, one each, and the pipeline's; then the
  // epilogue's.
  enum Barrier : uint32_t { kMultiply = 0, kPipelineMade = 2 };
  static_assert(Epilogue::kBarrier > kPipelineMade);
  static CUTLASS_DEVICE void wait_for_turn(int team) {
    if constexpr (kPingpong) cutlass::arch::NamedBarrier::sync(2 * kGroup, kMultiply + team);
  }
  static CUTLASS_DEVICE void give_turn(int team) {
    if constexpr (kPingpong) cutlass::arch::NamedBarrier::arrive(2 * kGroup, kMultiply + 1 - team);
  }

  CUTLASS_DEVICE void operator()(Params const& params, char* memory) const {
    auto& shared = *reinterpret_cast<SharedStorage*>(memory);
    int const warp = cutlass::canonical_warp_idx_sync();
    bool const multiplies = warp >= 4;

    typename Pipeline::Params made;
    made.role =
        multiplies ? Pipeline::ThreadCategory::Consumer : Pipeline::ThreadCategory::Producer;
    made.is_leader = threadIdx.x % kGroup == 0;
    made.num_consumers = kTeam;
    made.transaction_bytes = params.mainloop.tma_transaction_bytes;
    Pipeline pipeline(shared.pipeline, made, Cluster{});
    if constexpr (kClusterSize > 1) cute::cluster_arrive_relaxed();

    if (!multiplies) {
      if constexpr (kMovesRegisters) cutlass::arch::warpgroup_reg_dealloc<40>();
      if (warp == 0) {
        if constexpr (kClusterSize == 1) {
          __syncwarp();
          cutlass::arch::NamedBarrier::arrive(32 + kGroups * kGroup, kPipelineMade);
        }
        load(params, shared, pipeline);
      } else {
        params.prefetch(warp - 1);
        if (warp == 3) Epilogue::prefetch_descriptors(params.epilogue);
        if constexpr (kClusterSize > 1) cute::cluster_wait();
      }
    } else {
      if constexpr (kMovesRegisters) cutlass::arch::warpgroup_reg_alloc<232>();
      if constexpr (kClusterSize > 1) {
        cute::cluster_wait();
      } else {
        cutlass::arch::NamedBarrier::sync(32 + kGroups * kGroup, kPipelineMade);
      }
      multiply(params, shared, pipeline, kPingpong ? warp / 4 - 1 : 0);
    }
  }

  static CUTLASS_DEVICE int first_cluster() { return blockIdx.y / kClusterN; }
  static CUTLASS_DEVICE int launched_clusters() { return gridDim.y / kClusterN; }

  static CUTLASS_DEVICE auto coordinates(Params const& params, int cluster) {
    TileOrder::Tile const tile = params.order.at(cluster);
    auto const block = cute::block_id_in_cluster();
    return cute::make_coord(tile.m * kClusterM + static_cast<int>(block.x),
                            tile.n * kClusterN + static_cast<int>(block.y), cute::_, tile.batch);
  }

  static CUTLASS_DEVICE void load(Params const& params, SharedStorage& shared,
                                  Pipeline& pipeline) {
    Mainloop mainloop;
    if (cute::elect_one_sync()) Mainloop::prefetch_tma_descriptors(params.mainloop);
    auto const inputs = mainloop.load_init(params.shape, params.mainloop);
    int const k_tiles = cute::size<3>(cute::get<0>(inputs));
    auto state = cutlass::make_producer_start_state<Pipeline>();
    if constexpr (kClusterSize > 1) cute::cluster_wait();
    cutlass::arch::wait_on_dependent_grids();
    for (int i = first_cluster(); i < params.order.clusters; i += launched_clusters()) {
      mainloop.load(params.mainloop, pipeline, state, inputs, coordinates(params, i),
                    cute::make_coord_iterator(cute::shape<3>(cute::get<0>(inputs))), k_tiles,
                    threadIdx.x % 32, cute::block_rank_in_cluster(), shared.mainloop);
      state.advance(k_tiles);
    }
    mainloop.load_tail(pipeline, state);
  }

  static CUTLASS_DEVICE void multiply(Params const& params, SharedStorage& shared,
                                      Pipeline& pipeline, int team) {
    int const thread = (threadIdx.x - kGroup) % kTeam;
    typename Mainloop::TiledMma tiled_mma;
    Mainloop mainloop;
    Epilogue const epilogue{params.epilogue, shared.epilogue,
                            cutlass::canonical_warp_group_idx() - 1,
                            static_cast<int>(threadIdx.x % kGroup)};
    int const k_tiles = cute::ceil_div(cute::get<2>(params.shape), cute::size<2>(TileShape{}));
    typename Mainloop::PipelineState state;
    if (team == 1) {
      give_turn(1);
      state.advance(k_tiles);
    }
    cutlass::arch::wait_on_dependent_grids();  // for the scales of x
    // NOTES: at once, not behind the last tile: the blocks of the next kernel come as soon as those
    // of this one go. Up to 31 % at small M, and 7 % lost at 512x1280x3424; the geometric mean of
    // cuBLASLt's time / ours over 60 shapes was 1.110, and 1.074 with the trigger behind the last
    // MMAs (H200, 2026-11-22, in turn).
    cutlass::arch::launch_dependent_grids();
    int const step = kTeams * launched_clusters();
    int tile = 0;
    [[maybe_unused]] auto ahead = [] {
      if constexpr (kAhead) {
        return typename Mainloop::Part{};
      } else {
        return 0;
      }
    }();
    for (int i = first_cluster() + team * launched_clusters(); i < params.order.clusters;
         i += step) {
      auto const place = epilogue.place(coordinates(params, i));
      auto const vectors = epilogue.fetch(place);
      auto accumulators = cute::partition_fragment_C(tiled_mma, cute::take<0, 2>(TileShape{}));
      wait_for_turn(team);
      if constexpr (Epilogue::kResidual) epilogue.ask_for_residual(place, tile);
      if constexpr (kAhead) {
        mainloop.mma(pipeline, state, accumulators, k_tiles, thread, shared.mainloop,
                     ahead, i != first_cluster(), i + step < params.order.clusters);
      } else {
        mainloop.mma(pipeline, state, accumulators, k_tiles, thread, shared.mainloop,
                     params.mainloop);
      }
      give_turn(team);
      mainloop.mma_tail(pipeline, state, k_tiles);
      state.advance(k_tiles * kTeams);
      epilogue.stage(vectors);
      epilogue.store(accumulators, vectors, place, tile++);
      if constexpr (kAhead) Mainloop::settle(ahead);
    }
    epilogue.template wait_until_read<0>();  // else its memory is gone
  }

  static int blocks(Params const& params, int sm_count) {
    return kClusterSize *
           std::min(params.order.clusters, resident_clusters(sm_count, kClusterSize));
  }

  static char const* launch(Params const& params, int sm_count, bool dependent,
                            cudaStream_t stream) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(kClusterM, blocks(params, sm_count) / kClusterM);
    config.blockDim = dim3(MaxThreadsPerBlock);
    config.dynamicSmemBytes = SharedStorageSize;
    config.stream = stream;
    cudaLaunchAttribute attributes[2];
    config.attrs = attributes;
    if (kClusterSize > 1) {
      attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
      attributes[config.numAttrs++].val.clusterDim = {kClusterM, kClusterN, 1};
    }
    if (dependent) {
      attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    cudaError_t const status =
        cudaLaunchKernelEx(&config, cutlass::device_kernel<GemmKernel>, params);
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
  }
};

}  // namespace jaxfp8
