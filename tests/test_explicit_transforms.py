"""vmap and derivatives on a mesh of Explicit axes: values to the bit, and their types."""

import functools

import jax
import jax.numpy as jnp
import pytest
from explicit_cases import (
    MESH,
    assert_typed,
    bias_of,
    kernel_on_mesh,
    on_mesh,
    rows,
    weight,
    whole_numbers,
)
from jax.sharding import PartitionSpec as P

from jaxfp8 import PaddedKernel, fp8_dense, fp8_dense_float, quantize_input


f = functools.partial(fp8_dense, activation="relu")
wraps = pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jit", "eager"])
N = 52
KERNEL, BIAS = PaddedKernel.from_dense(weight(N)), bias_of(N)
STACK = PaddedKernel.from_dense(weight(N, 4))
X = rows(4, 8)


def weighted(y):
    """A sum whose gradient is no constant."""
    return jnp.sum(y * whole_numbers(9, *y.shape)) / 64


@wraps
@pytest.mark.parametrize(
    ("spec", "features"),
    [(("data",), None), (("data",), "model"), (("data", "model"), None), ((None, "data"), "model")],
)
def test_vmap_over_rows(spec, features, wrap):
    """A batch that is split over devices stays so: each folds what it has."""
    g = jax.vmap(f, in_axes=(0, None, None))
    with jax.set_mesh(MESH):
        y = wrap(g)(on_mesh(X, *spec), kernel_on_mesh(weight(N), features), on_mesh(BIAS))
        q = wrap(jax.vmap(quantize_input))(on_mesh(X, *spec))
    assert_typed(y, f(X, KERNEL, BIAS), P(*[*spec, None][:2], features))
    assert_typed(q, quantize_input(X), *[P(*spec)] * 2)


@wraps
@pytest.mark.parametrize("features", [None, "model"])
@pytest.mark.parametrize("shared", [True, False], ids=["one x", "an x for each"])
def test_vmap_over_a_stack_of_kernels(shared, features, wrap):
    """Experts: each device loops over those that it has."""
    g = jax.vmap(f, in_axes=(None if shared else 0, 0))
    kernels = kernel_on_mesh(weight(N, 4), features, stack=("data",))
    with jax.set_mesh(MESH):
        y = wrap(g)(on_mesh(X) if shared else on_mesh(X, "data"), kernels)
    spec = P("data", None, None, features) if shared else P("data", None, features)
    assert_typed(y, g(X, STACK), spec)


def test_vmap_over_two_axes():
    g = jax.vmap(jax.vmap(f, in_axes=(0, None)), in_axes=(0, None))
    with jax.set_mesh(MESH):
        y = jax.jit(g)(on_mesh(X, "data", "model"), kernel_on_mesh(weight(N)))
    assert_typed(y, f(X, KERNEL), P("data", "model", None))


@wraps
@pytest.mark.parametrize(
    ("spec", "features"), [(("data",), None), ((), "model"), (("data",), "model")]
)
def test_gradients_lie_like_what_they_are_of(spec, features, wrap):
    """JAX sums over devices: x's where features are split, the bias's where rows are."""

    def loss(x, bias, kernel):
        return weighted(f(x, kernel, bias))

    g = jax.grad(loss, (0, 1))
    with jax.set_mesh(MESH):
        got = wrap(g)(
            on_mesh(X, *spec), on_mesh(BIAS, features), kernel_on_mesh(weight(N), features)
        )
    assert_typed(got, g(X, BIAS, KERNEL), P(*spec), P(features))


@wraps
@pytest.mark.parametrize("contracted", [None, "data"])
def test_gradients_of_float_weights(contracted, wrap):
    """Data and tensor parallel training, and with weights gathered for each step."""

    def loss(x, w, bias):
        return weighted(fp8_dense_float(x, w, bias, activation="relu"))

    g, w = jax.grad(loss, (0, 1, 2)), weight(N)
    with jax.set_mesh(MESH):
        got = wrap(g)(on_mesh(X, "data"), on_mesh(w, contracted, "model"), on_mesh(BIAS, "model"))
    assert_typed(got, g(X, w, BIAS), P("data"), P(contracted, "model"), P("model"))


@wraps
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_gradients_of_a_bias_alone(activation, wrap):
    def loss(bias, x, kernel):
        return weighted(fp8_dense(x, kernel, bias, activation=activation))

    g = jax.grad(loss)
    with jax.set_mesh(MESH):
        kernel = kernel_on_mesh(weight(N), "model")
        got = wrap(g)(on_mesh(BIAS, "model"), on_mesh(X, "data"), kernel)
    assert_typed(got, g(BIAS, X, KERNEL), P("model"))


@wraps
def test_gradients_of_a_batch(wrap):
    """Both orders: a gradient for each example, and one of all."""

    def loss(x, kernel):
        return weighted(f(x, kernel))

    def total(x, kernel):
        return jnp.sum(jax.vmap(loss, in_axes=(0, None))(x, kernel))

    each, one = jax.vmap(jax.grad(loss), in_axes=(0, None)), jax.grad(total)
    with jax.set_mesh(MESH):
        x, kernel = on_mesh(X, "data"), kernel_on_mesh(weight(N), "model")
        got = wrap(each)(x, kernel), wrap(one)(x, kernel)
    assert_typed(got, (each(X, KERNEL), one(X, KERNEL)), P("data"), P("data"))


@wraps
@pytest.mark.parametrize("features", [None, "model"])
def test_jvp(features, wrap):
    def jvp(x, kernel, tangent):
        return jax.jvp(lambda x: f(x, kernel), (x,), (tangent,))

    tangent = whole_numbers(5, *X.shape)
    with jax.set_mesh(MESH):
        kernel = kernel_on_mesh(weight(N), features)
        got = wrap(jvp)(on_mesh(X, "data"), kernel, on_mesh(tangent, "data"))
    assert_typed(got, jvp(X, KERNEL, tangent), *[P("data", None, features)] * 2)


def test_hessian_of_a_layer_with_an_activation():
    """Curvature comes from the activation alone; in float32, so to rounding."""
    x, k = X[0, :4] / 448, weight(N) / 448

    def loss(scale, x, kernel):
        return jnp.sum(fp8_dense(scale * x, kernel, activation="silu"))

    with jax.set_mesh(MESH):
        got = jax.jit(jax.hessian(loss))(
            jnp.float32(1), on_mesh(x, "data"), kernel_on_mesh(k, "model")
        )
    want = jax.hessian(loss)(jnp.float32(1), x, PaddedKernel.from_dense(k))
    # Sums of 208 terms, some of which cancel.
    assert abs(float(got) - float(want)) < 1e-4 * abs(float(want))


def test_rematerialized_and_scanned():
    w = weight(40) / 448  # square, so that it can be chained

    def chain(x, kernels):
        body = jax.checkpoint(lambda x, kernel: (f(x, kernel) / 512, None))
        return jax.lax.scan(body, x, kernels)[0]

    stack = jnp.stack([w, w[::-1]])
    loss = jax.value_and_grad(lambda x, kernels: weighted(chain(x, kernels)))
    want = loss(X, PaddedKernel.from_dense(stack))
    with jax.set_mesh(MESH):
        kernels = kernel_on_mesh(stack, stack=(None,))
        got = jax.jit(loss)(on_mesh(X, "data"), kernels)
    assert jax.typeof(got[1]).sharding.spec == P("data", None, None)
    for a, b in zip(got, want, strict=True):
        assert jnp.allclose(jax.device_get(a), b, rtol=1e-5, atol=1e-5 * jnp.abs(b).max())
