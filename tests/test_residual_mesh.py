"""A residual on a mesh of Explicit axes: split as the result is, otherwise, or alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from explicit_cases import (
    alone,
    assert_typed,
    bias_of,
    compiled,
    kernel_on_mesh,
    on_mesh,
    rows,
    weight,
    whole_numbers,
)
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from update_cases import mesh_devices

from jaxfp8 import PaddedKernel, fp8_dense
from jaxfp8.dense_float import fp8_dense_float


@pytest.mark.parametrize(("features", "lead"), [("model", "data"), (None, "data"), ("model", None)])
@pytest.mark.parametrize("n", [64, 52])
def test_on_a_mesh_of_explicit_axes(n, features, lead):
    w, x, bias, residual = weight(n), rows(8), bias_of(n), whole_numbers(5, 8, n)
    want = fp8_dense(x, PaddedKernel.from_dense(w), bias, residual=residual)
    spec = P(lead, features)
    operands = on_mesh(x, lead), kernel_on_mesh(w, features), on_mesh(bias, features)
    for placed in (on_mesh(residual, *spec), on_mesh(residual)):
        got = compiled(lambda x, k, b, r: fp8_dense(x, k, b, residual=r))(*operands, placed)
        assert_typed(got, want, spec)
        floats = on_mesh(x, lead), on_mesh(w, None, features), on_mesh(bias, features)
        got = compiled(lambda x, w, b, r: fp8_dense_float(x, w, b, residual=r))(*floats, placed)
        assert_typed(got, want, spec)


def test_axes_that_divide_the_features_but_not_the_padded_ones():
    """54 by 3, padded 64: the residual and the bias are brought to where they are wanted first."""
    axis_types = (AxisType.Explicit, AxisType.Explicit)
    mesh = Mesh(np.array(mesh_devices(3)).reshape(3, 1), ("data", "model"), axis_types=axis_types)
    n = 54
    x, w, bias, residual = rows(6), weight(n), bias_of(n), whole_numbers(5, 6, n)
    want = fp8_dense(x, PaddedKernel.from_dense(w), bias, residual=residual)
    with jax.set_mesh(mesh):
        got = jax.jit(lambda x, k, b, r: fp8_dense(x, k, b, residual=r))(
            on_mesh(x, mesh=mesh),
            kernel_on_mesh(w, "model", mesh=mesh),
            on_mesh(bias, "data", mesh=mesh),
            on_mesh(residual, None, "data", mesh=mesh),
        )
    assert_typed(got, want, P(None, "model"))


@pytest.mark.parametrize("n", [64, 52])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=lambda d: d.__name__)
def test_alone_split_on_a_mesh(dtype, n):
    """Beside operands that are whole on every device it is made whole, and a bias too."""
    x, bias, residual = rows(2, 4), bias_of(n), whole_numbers(5, 2, 4, n).astype(dtype)
    kernel = PaddedKernel.from_dense(weight(n))
    want = fp8_dense(x.astype(dtype), kernel, bias, residual=residual)
    operands = on_mesh(x.astype(dtype)), kernel_on_mesh(weight(n)), on_mesh(bias, "model")
    for way in (compiled, alone):
        f = way(lambda x, k, b, r: fp8_dense(x, k, b, residual=r))
        assert_typed(f(*operands, on_mesh(residual, None, "data", "model")), want, P())


def test_a_wrong_one_on_a_mesh():
    """The whole result's shape is said, not a device's part of it."""
    x, w = on_mesh(rows(8), "data"), on_mesh(weight(64), None, "model")
    for shape in ((64,), (1, 64), (8, 80)):
        with pytest.raises(ValueError, match=r"the shape of the result, \(8, 64\)"):
            compiled(lambda x, w, s=shape: fp8_dense_float(x, w, residual=jnp.zeros(s)))(x, w)
