"""Shardings on meshes of Explicit axes that the operations cannot take."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bad_input import Case
from explicit_cases import K, kernel_on_mesh, on_mesh, rows, weight
from jax.sharding import AxisType, Mesh
from update_cases import mesh_devices

from jaxfp8 import PaddedKernel, fp8_dense, fp8_dense_float


Prepared = tuple[Any, Callable[[], object]]


def partial_sums(folder: Path) -> Prepared:
    kernel = kernel_on_mesh(weight(64), None, "model")
    x = on_mesh(rows(8), "data", "model")
    return kernel, lambda: jax.jit(fp8_dense)(x, kernel)


def partial_sums_of_floats(folder: Path) -> Prepared:
    w, x = on_mesh(weight(64), "model"), on_mesh(rows(8), "data", "model")
    return w, lambda: fp8_dense_float(x, w)


def one_axis_for_two(folder: Path) -> Prepared:
    kernel = kernel_on_mesh(weight(64), "data")
    return kernel, lambda: jax.jit(fp8_dense)(on_mesh(rows(8), "data"), kernel)


def uneven_result(folder: Path) -> Prepared:
    kernel = kernel_on_mesh(weight(50), ("data", "model"))
    return kernel, lambda: fp8_dense(on_mesh(rows(8)), kernel)


def uneven_dequantized(folder: Path) -> Prepared:
    kernel = kernel_on_mesh(weight(50), ("data", "model"))
    return kernel, lambda: jax.jit(PaddedKernel.dequantize)(kernel)


def uneven_padding(folder: Path) -> Prepared:
    mesh = Mesh(np.array(mesh_devices(3)), ("model",), axis_types=(AxisType.Explicit,))
    w = on_mesh(weight(51), None, "model", mesh=mesh)
    return w, lambda: PaddedKernel.from_dense(w)


def differentiated(folder: Path) -> Prepared:
    kernel, x = kernel_on_mesh(weight(64), "model"), on_mesh(rows(8), "data")
    grad = jax.grad(lambda kernel: jnp.sum(fp8_dense(x, kernel)), allow_int=True)
    return kernel, lambda: jax.jit(grad)(kernel)


SUMMED = ("partial products", "jax.reshard", "jax.shard_map", "jax.lax.psum")
UNEVEN = ("is split over 4 devices", "('data', 'model')", "64", "50", "jax.reshard")
CASES = [
    Case("K split in both", partial_sums, ValueError, ("`x`", "`kernel`", "'model'", *SUMMED)),
    Case("K split in both, floats", partial_sums_of_floats, ValueError, ("`x`", "`w`", *SUMMED)),
    Case(
        "one mesh axis for rows and features",
        one_axis_for_two,
        ValueError,
        ("`x` and `kernel`", "('data', 'data')", "only one of its axes", "jax.reshard"),
    ),
    Case("a result that cannot be even", uneven_result, ValueError, ("`kernel`", *UNEVEN)),
    Case("the same, dequantized", uneven_dequantized, ValueError, ("`qvalue`", *UNEVEN)),
    Case(
        "padding that cannot be even",
        uneven_padding,
        ValueError,
        ("`w` is split over 3 devices", "'model'", "51", "64", "jax.reshard"),
    ),
    Case("a kernel differentiated", differentiated, TypeError, ("`kernel`", "stop_gradient")),
]
assert K == 40  # padded 48, so that K is never what is uneven
