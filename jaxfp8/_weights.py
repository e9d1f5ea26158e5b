"""The custom calls that write loaded weights: several of one shape, by one kernel each time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from jaxfp8._cutlass import PAD_WEIGHT_TARGET, WEIGHT_SCALE_TARGET, call, or_empty
from jaxfp8.padded import Layout, padded_size
from jaxfp8.quantize import FP8_DTYPE


if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float8e4m3fn, Float32

MAX_WEIGHTS = 32  # of one call; `kMaxWeights` in `cuda/src/weight.h`
MAX_STACK = 65535  # matrices of a weight; `kMaxStack` in `cuda/src/weight_handlers.cc`


def weight_scale(
    weights: Sequence[Float[Array, "*stack A B"]], *, layout: Layout
) -> Float32[Array, "weights *stack N"]:
    """`scale_from_amax(absolute_maximum(w))` for each output feature of each weight.

    One custom call and one kernel. The weights have one shape and dtype, and are at most
    `MAX_WEIGHTS`.
    """
    stack, n, _ = _weight_sizes(weights[0], layout)
    (scale,) = call(
        WEIGHT_SCALE_TARGET,
        [((len(weights), *stack, n), jnp.float32)],
        list(weights),
        in_out=np.int32(layout == "in_out"),
    )
    return scale


def pad_weight(
    weights: Sequence[Float[Array, "*stack A B"]],
    scale: Float32[Array, "weights *stack N"] | None = None,
    *,
    layout: Layout,
) -> list[tuple[Float8e4m3fn[Array, "*stack N_pad K_pad"], Float32[Array, "*stack N_pad"]]]:
    """`PaddedKernel.from_dense(w)`, per channel, of each weight; measures unless given the scales.

    One custom call and one kernel, of weights as `weight_scale` takes them.
    """
    stack, n, k = _weight_sizes(weights[0], layout)
    n_pad, k_pad = padded_size(n), padded_size(k)
    count = len(weights)
    results = call(
        PAD_WEIGHT_TARGET,
        [((*stack, n_pad, k_pad), FP8_DTYPE)] * count + [((*stack, n_pad), jnp.float32)] * count,
        [or_empty(scale), *weights],
        in_out=np.int32(layout == "in_out"),
    )
    return list(zip(results[:count], results[count:], strict=True))


def _weight_sizes(w: jax.Array, layout: Layout) -> tuple[tuple[int, ...], int, int]:
    """Stack, N and K."""
    *stack, a, b = w.shape
    return (tuple(stack), b, a) if layout == "in_out" else (tuple(stack), a, b)
