// A CUTLASS mainloop whose tiles begin earlier for some classes of rows (store.cuh).
#pragma once

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"

namespace jaxfp8 {

// In batch `l`, the tile of columns n starts at row n - l * step of the weight; TMA fills what is
// outside of the weight with zeros. All batches read the same weight.
template <class Base>
struct ClassMainloop : Base {
  struct Params : Base::Params {
    int step = 0;
  };

  template <class ProblemShape>
  static constexpr Params to_underlying_arguments(ProblemShape const& shape,
                                                  typename Base::Arguments const& args,
                                                  void* workspace) {
    return {Base::to_underlying_arguments(shape, args, workspace)};
  }

  template <class ProblemShape>
  CUTLASS_DEVICE auto load_init(ProblemShape const& shape, Params const& params) const {
    using namespace cute;
    auto const [M, N, K, L] = shape;
    auto const x = get<0>(Base::load_init(shape, params));
    auto const coordinates = params.tma_load_b.get_tma_tensor(make_shape(N, K, L));  // (n, k, l)
    auto const strides = make_stride(stride<0>(coordinates), stride<1>(coordinates),
                                     E<1>{} * (-params.step));
    auto const shifted = make_tensor(coordinates.data(), make_layout(make_shape(N, K, L), strides));
    using Tile = typename Base::TileShape;
    auto const weight =
        local_tile(shifted, Tile{}, make_coord(_, _, _), Step<Underscore, _1, _1>{});
    return make_tuple(x, weight);
  }
};

}  // namespace jaxfp8
