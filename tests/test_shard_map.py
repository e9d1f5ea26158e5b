"""`fp8_dense` under `shard_map`: local rows, local weights, and what is lowered for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CLOSE, bits, check_quantized, randn
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxfp8 import PaddedKernel, QuantizedInput, fp8_dense, quantize_input
from jaxfp8.dense_float import fp8_dense_float


# conftest.py makes four CPU devices.
MESH = Mesh(np.array(jax.devices("cpu")[:4]), ("data",), axis_types=(AxisType.Auto,))
K, N = 33, 50
X, W, BIAS = randn(0, (8, K)), randn(1, (K, N)) / 6, randn(2, (N,))
KERNEL = PaddedKernel.from_dense(W)
WANT = fp8_dense(X, KERNEL, BIAS, activation="gelu", implementation="xla")
f = functools.partial(fp8_dense, activation="gelu")
REPLICATED = P()
check_vma = pytest.mark.parametrize("check_vma", [True, False])


def sharded(f, in_specs, out_specs, check_vma):
    return jax.shard_map(f, mesh=MESH, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)


def on_mesh(a, spec=REPLICATED):
    return jax.device_put(a, NamedSharding(MESH, spec))


@check_vma
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_rows_sharded_and_weights_replicated(wrap, check_vma):
    g = wrap(sharded(f, (P("data"), P(), P()), P("data"), check_vma))
    y = g(on_mesh(X, P("data")), on_mesh(KERNEL), on_mesh(BIAS))
    np.testing.assert_allclose(y, WANT, **CLOSE)
    assert y.sharding.spec == P("data")


@check_vma
def test_lowering_for_cuda(check_vma):
    """The custom call's results are typed as varying, and its operands alike."""
    mesh = jax.sharding.AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,))
    g = jax.shard_map(
        f, mesh=mesh, in_specs=(P("data"), P(), P()), out_specs=P("data"), check_vma=check_vma
    )
    lowered = jax.jit(g).trace(X, KERNEL, BIAS).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert text.count("stablehlo.custom_call @jaxfp8_dense_v1") == 1
    # On the two rows of one device, nothing gathered first.
    assert "tensor<2x50xf32>" in text and "all_gather" not in text


@check_vma
def test_local_kernels_of_the_output_features(check_vma):
    """N split into kernels of its own: a stack whose first axis is sharded, one layer on each."""
    w, bias = randn(3, (4, K, 20)), randn(4, (4, 20))
    stack = PaddedKernel.from_dense(w)

    def local(x, kernel, bias):
        one = jax.tree.map(lambda a: a[0], kernel)
        return fp8_dense(x, one, bias[0])

    g = jax.jit(sharded(local, (P(), P("data"), P("data")), P(None, "data"), check_vma))
    y = g(on_mesh(X), on_mesh(stack, P("data")), on_mesh(bias, P("data")))
    layers = [jax.tree.map(lambda a, i=i: a[i], stack) for i in range(4)]
    want = [fp8_dense(X, layers[i], bias[i], implementation="xla") for i in range(4)]
    np.testing.assert_allclose(y, np.concatenate(want, axis=1), **CLOSE)


@check_vma
def test_input_features_split_and_summed(check_vma):
    """K split: partial products of local kernels, summed across devices."""
    w = randn(5, (4, 16, N))
    stack = PaddedKernel.from_dense(w)
    x = randn(6, (8, 64))

    def local(x, kernel):
        one = jax.tree.map(lambda a: a[0], kernel)
        return jax.lax.psum(fp8_dense(x, one), "data")

    g = jax.jit(sharded(local, (P(None, "data"), P("data")), P(), check_vma))
    y = g(on_mesh(x, P(None, "data")), on_mesh(stack, P("data")))
    layers = [jax.tree.map(lambda a, i=i: a[i], stack) for i in range(4)]
    parts = [
        fp8_dense(x[:, 16 * i : 16 * i + 16], layers[i], implementation="xla") for i in range(4)
    ]
    np.testing.assert_allclose(y, sum(parts), **CLOSE)


@check_vma
def test_gradients_of_local_rows(check_vma):
    def loss(x, kernel):
        return jax.lax.psum(jnp.sum(f(x, kernel) ** 2), "data")

    g = jax.jit(jax.grad(sharded(loss, (P("data"), P()), P(), check_vma)))
    got = g(on_mesh(X, P("data")), on_mesh(KERNEL))
    want = jax.grad(lambda x: jnp.sum(f(x, KERNEL, implementation="xla") ** 2))(X)
    np.testing.assert_allclose(got, want, **CLOSE)


@pytest.mark.parametrize("activation", [None, "gelu"])
@check_vma
def test_gradients_of_a_replicated_bias_alone(check_vma, activation):
    """x varies over the devices and is not differentiated: the tangent varies all the same."""
    dense = functools.partial(fp8_dense, activation=activation)
    g = sharded(dense, (P("data"), P(), P()), P("data"), check_vma)
    got = jax.jit(jax.grad(lambda bias: jnp.sum(g(X, KERNEL, bias) ** 2)))(BIAS)
    want = jax.grad(lambda bias: jnp.sum(dense(X, KERNEL, bias) ** 2))(BIAS)
    np.testing.assert_allclose(got, want, rtol=CLOSE["rtol"], atol=CLOSE["rtol"] * want.max())


@pytest.mark.parametrize("activation", [None, "gelu"])
@check_vma
def test_gradients_beside_a_residual_that_alone_varies(check_vma, activation):
    """Each device adds rows of its own to the same product."""
    dense = functools.partial(fp8_dense, activation=activation)
    x, residual = X[:2], randn(3, (8, N))

    def add(x, kernel, residual):
        return dense(x, kernel, residual=residual)

    g = sharded(add, (P(), P(), P("data")), P("data"), check_vma)
    got = jax.jit(jax.grad(lambda x, r: jnp.sum(g(x, KERNEL, r) ** 2), (0, 1)))(x, residual)
    apart = jax.grad(lambda x, r: jnp.sum((jnp.tile(dense(x, KERNEL), (4, 1)) + r) ** 2), (0, 1))(
        x, residual
    )
    for a, b in zip(got, apart, strict=True):
        np.testing.assert_allclose(a, b, rtol=CLOSE["rtol"], atol=CLOSE["rtol"] * np.abs(b).max())


def test_gradients_of_replicated_float_weights_are_summed():
    def loss(x, w, bias):
        return jax.lax.psum(jnp.sum(fp8_dense_float(x, w, bias) ** 2), "data")

    g = jax.jit(jax.grad(sharded(loss, (P("data"), P(), P()), P(), True), (1, 2)))
    got = g(on_mesh(X, P("data")), on_mesh(W), on_mesh(BIAS))
    want = jax.grad(lambda w, b: jnp.sum(fp8_dense_float(X, w, b) ** 2), (0, 1))(W, BIAS)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=CLOSE["rtol"], atol=CLOSE["rtol"] * np.abs(b).max())


@check_vma
def test_quantized_once_and_for_the_next_layer(check_vma):
    """Rows stay where they are; a static scale is one for all devices, one for a row goes along."""
    back, scale = PaddedKernel.from_dense(randn(8, (N, K)) / 7), np.float32(0.02)

    def local(x, kernel, back, bias):
        qx = quantize_input(x)
        hidden = fp8_dense(qx, kernel, bias, activation="gelu", out_scale=scale)
        return qx, hidden, fp8_dense(hidden, back, out_dtype=jnp.float32)

    rows = P("data")
    in_specs = rows, P(), P(), P()
    out_specs = rows, QuantizedInput(rows, P(), N), rows
    args = X, KERNEL, back, BIAS
    g = jax.jit(sharded(local, in_specs, out_specs, check_vma))
    qx, hidden, y = g(on_mesh(X, rows), *map(on_mesh, args[1:]))
    want = quantize_input(X, implementation="xla")
    np.testing.assert_array_equal(bits(qx.qvalue), bits(want.qvalue))
    np.testing.assert_array_equal(bits(qx.scale), bits(want.scale))
    assert hidden.scale == scale and hidden.qvalue.sharding.spec[0] == "data"
    check_quantized(hidden.qvalue, WANT, scale, slack=20 * CLOSE["atol"])
    hidden = jax.device_get(hidden)
    want = fp8_dense(hidden, back, out_dtype=jnp.float32, implementation="xla")
    np.testing.assert_allclose(y, want, **CLOSE)
    # Lowered for CUDA: two rows on each device, and nothing gathered.
    mesh = jax.sharding.AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,))
    g = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)
    text = jax.jit(g).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @jaxfp8_quantize_v1") == 1
    assert text.count("custom_call @jaxfp8_scaled_matmul_v1") == 2
    assert "tensor<2x64xf8E4M3FN>" in text and "all_gather" not in text


def test_vmap_inside_folds():
    x = randn(7, (8, 3, K))
    rows = sharded(jax.vmap(f, in_axes=(0, None, None)), (P("data"), P(), P()), P("data"), True)
    y = jax.jit(rows)(on_mesh(x, P("data")), on_mesh(KERNEL), on_mesh(BIAS))
    want = f(x, KERNEL, BIAS, implementation="xla")
    np.testing.assert_allclose(y, want, **CLOSE)
    text = jax.jit(rows).lower(x, KERNEL, BIAS).as_text()
    assert text.count("stablehlo.dot_general") == 1
