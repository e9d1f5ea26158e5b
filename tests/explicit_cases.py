"""A mesh of Explicit axes, and operands whose products and sums are exact in any order."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from update_cases import mesh_devices

from jaxfp8 import PaddedKernel


def mesh_of(*kinds: AxisType) -> Mesh:
    """2 x 2 devices, axes "data" and "model"."""
    return Mesh(np.array(mesh_devices(4)).reshape(2, 2), ("data", "model"), axis_types=kinds)


MESH = mesh_of(AxisType.Explicit, AxisType.Explicit)
K = 40
# Logical and padded sizes that two devices divide into: 32 and 32 rows; 26, padded 32; 20, padded
# 24, which is no multiple of 16.
FEATURES = (64, 52, 40)


def compiled(f: Any) -> Any:
    """Under `jit`, with the mesh in context."""

    def call(*args: Any) -> Any:
        with jax.set_mesh(MESH):
            return jax.jit(f)(*args)

    return call


def alone(f: Any) -> Any:
    """Without `jit`, the mesh known from the arrays' types."""
    return f


ways = pytest.mark.parametrize("way", [compiled, alone])


def on_mesh(a: Any, *spec: Any, mesh: Mesh = MESH) -> Any:
    """An array on the mesh."""
    return jax.device_put(a, NamedSharding(mesh, P(*spec)))


def whole_numbers(seed: int, *shape: int, axis: int = -1) -> np.ndarray:
    """Multiples of 64 from -448 to 448, with 448 in each slice: quantized as they are, by 1."""
    a = np.random.default_rng([seed, *shape]).integers(-7, 8, shape)
    a[(*(slice(None),) * (axis % len(shape)), 0)] = 7
    return (64 * a).astype(np.float32)


def weight(n: int, *stack: int) -> np.ndarray:
    """`[*stack, K, n]`."""
    return whole_numbers(1, *stack, K, n, axis=-2)


def bias_of(n: int) -> np.ndarray:
    """`[n]`."""
    return whole_numbers(2, n)


def kernel_on_mesh(
    w: Any, features: Any = None, contracted: Any = None, *, stack: tuple = (), mesh: Mesh = MESH
) -> PaddedKernel:
    """The kernel of `w`, its output and input features split by these axes, and its stack."""
    kernel = PaddedKernel.from_dense(w)
    return PaddedKernel(
        on_mesh(kernel.qvalue, *stack, features, contracted, mesh=mesh),
        on_mesh(kernel.scale, *stack, features, mesh=mesh),
        kernel.in_features,
        kernel.out_features,
    )


def assert_typed(tree: Any, want: Any, *specs: P) -> None:
    """The values of `want` to the bit, each leaf typed as split by its spec."""
    got, want = jax.tree.leaves(tree), jax.tree.leaves(want)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
    for a, spec in zip(got, specs, strict=True):
        full = (*spec, *(None,) * (a.ndim - len(spec)))
        said = (jax.typeof(a).sharding.spec, a.sharding.spec)
        assert [(*s, *(None,) * (a.ndim - len(s))) for s in said] == [full, full]


def rows(*lead: int) -> np.ndarray:
    """`[*lead, K]`."""
    return whole_numbers(3, *lead, K)
