"""Derivatives: straight-through with respect to x, weights and bias, refused for FP8 weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CLOSE, implementations, quantized_randn, randn, random_scales

from jaxfp8 import PaddedKernel, fp8_dense, scaled_matmul
from jaxfp8.dense_float import fp8_dense_float


M, K, N = 6, 33, 50
X, W, BIAS = randn(0, (M, K)), randn(1, (K, N)) / 6, randn(2, (N,))
KERNEL = PaddedKernel.from_dense(W)
FUNCTIONS = {
    None: lambda y: y,
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
}
activations = pytest.mark.parametrize("activation", list(FUNCTIONS))
exact = jax.default_matmul_precision("highest")  # for what XLA multiplies in a reference


def straight_through(implementation, activation=None, w=None, x_scale=None):
    """`fp8_dense` in plain JAX: the rounding of x is a constant added to the exact product."""
    w = KERNEL.dequantize() if w is None else w

    def f(x, bias):
        rounded = fp8_dense(
            x, KERNEL, x_scale=x_scale, out_dtype=jnp.float32, implementation=implementation
        )
        with exact:
            product = x.astype(jnp.float32) @ w
        pre = product + jax.lax.stop_gradient(rounded - product) + bias
        return FUNCTIONS[activation](pre)

    return f


def dense(implementation, activation=None, **options):
    return lambda x, bias: fp8_dense(
        x, KERNEL, bias, activation=activation, implementation=implementation, **options
    )


@implementations
@activations
def test_grad_and_jvp_and_vjp(activation, implementation):
    f, want = dense(implementation, activation), straight_through(implementation, activation)
    tangents = randn(3, X.shape), randn(4, BIAS.shape)
    np.testing.assert_allclose(f(X, BIAS), want(X, BIAS), **CLOSE)
    for argnums in (0, 1, (0, 1)):
        got = jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a))), argnums))(X, BIAS)
        ref = jax.grad(lambda *a: jnp.sum(jnp.sin(want(*a))), argnums)(X, BIAS)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), got, ref)
    got, ref = (jax.jvp(g, (X, BIAS), tangents)[1] for g in (f, want))
    np.testing.assert_allclose(got, ref, **CLOSE)
    cotangent = randn(5, (M, N))
    got, ref = (jax.vjp(g, X, BIAS)[1](cotangent) for g in (f, want))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), got, ref)


@implementations
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_hessian(activation, implementation):
    x, small = X[:1], slice(0, 1)
    f, want = dense(implementation, activation), straight_through(implementation, activation)
    got, ref = (jax.hessian(lambda x, g=g: g(x, BIAS)[small].sum())(x) for g in (f, want))
    assert np.abs(ref).max() > 0.01  # there is something to compare
    np.testing.assert_allclose(got, ref, **CLOSE)


@implementations
def test_vmap_of_grad_and_jit_of_grad(implementation):
    f, want = dense(implementation, "silu"), straight_through(implementation, "silu")
    x = randn(6, (3, M, K))
    got = jax.jit(jax.vmap(jax.grad(lambda x: f(x, BIAS).sum())))(x)
    ref = np.stack([jax.grad(lambda x: want(x, BIAS).sum())(row) for row in x])
    np.testing.assert_allclose(got, ref, **CLOSE)


@implementations
def test_grad_over_stacked_kernels(implementation):
    stack = PaddedKernel.from_dense(jnp.stack([W, 2 * W]))
    f = functools.partial(fp8_dense, implementation=implementation)
    got = jax.grad(lambda x: jnp.sum(jax.vmap(f, in_axes=(None, 0))(x, stack)))(X)
    with exact:
        ref = jax.grad(lambda x: jnp.sum(x @ stack.dequantize()))(X)
    np.testing.assert_allclose(got, ref, **CLOSE)


@implementations
def test_static_scale_is_straight_through_where_it_saturates(implementation):
    f = dense(implementation, x_scale=jnp.float32(1e-3))  # past 0.448
    got = jax.grad(lambda x: f(x, BIAS).sum())(X)
    with exact:
        ref = jnp.broadcast_to(KERNEL.dequantize().sum(1), X.shape)
    np.testing.assert_allclose(got, ref, **CLOSE)


@implementations
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gradients_have_the_dtype_of_what_they_are_for(dtype, implementation):
    f, x = dense(implementation, "gelu"), X.astype(dtype)
    got = jax.grad(lambda *a: f(*a).astype(jnp.float32).sum(), (0, 1))(x, BIAS)
    assert (got[0].dtype, got[1].dtype) == (dtype, jnp.float32)
    want = straight_through(implementation, "gelu")
    ref = jax.grad(lambda *a: want(*a).sum(), (0, 1))(x.astype(jnp.float32), BIAS)
    # The cotangent passes the result's dtype on its way: a rounding of each of N terms.
    for a, b in zip(got, ref, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=0.02, atol=0.02)


@implementations
def test_remat(implementation):
    f = dense(implementation, "gelu")
    got = jax.grad(lambda x: jnp.sum(jax.checkpoint(f)(x, BIAS) ** 2))(X)
    ref = jax.grad(lambda x: jnp.sum(f(x, BIAS) ** 2))(X)
    np.testing.assert_allclose(got, ref, **CLOSE)


@implementations
def test_grad_through_scan(implementation):
    stack = PaddedKernel.from_dense(randn(7, (3, K, K)) / 6)

    def step(x, kernel):
        return fp8_dense(x, kernel, activation="silu", implementation=implementation), None

    def unrolled(x):
        for i in range(3):
            x, _ = step(x, jax.tree.map(lambda a, i=i: a[i], stack))
        return jnp.sum(x)

    for body in (step, jax.checkpoint(step)):
        got = jax.jit(jax.grad(lambda x, body=body: jnp.sum(jax.lax.scan(body, x, stack)[0])))(X)
        np.testing.assert_allclose(got, jax.grad(unrolled)(X), **CLOSE)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["", "jit", "remat"])
def test_an_fp8_kernel_is_not_trained_by_accident(wrap):
    loss = wrap(lambda params, x: fp8_dense(x, params["kernel"], params["bias"]).sum())
    params = {"kernel": KERNEL, "bias": BIAS}
    with pytest.raises(TypeError, match=r"`kernel` is a PaddedKernel.*float `param_dtype`.*stop_"):
        jax.grad(loss)(params, X)
    # The remedy for training something beside it.
    stopped = wrap(lambda lora, x: loss(jax.lax.stop_gradient(params), x + lora))
    got = jax.grad(stopped)(jnp.zeros(K), X)
    with exact:
        ref = M * KERNEL.dequantize().sum(1)
    np.testing.assert_allclose(got, ref, **CLOSE)


def test_jvp_with_respect_to_a_kernel_is_refused():
    tangent = jax.tree.map(jnp.ones_like, KERNEL)
    with pytest.raises(TypeError, match="`kernel` is a PaddedKernel"):
        jax.jvp(lambda k: fp8_dense(X, k), (KERNEL,), (tangent,))


@implementations
def test_scaled_matmul_is_differentiable_in_its_floats(implementation):
    rng = np.random.default_rng(8)
    lhs, rhs = (jnp.asarray(quantized_randn(rng, s)) for s in ((M, 48), (32, 48)))
    floats = random_scales(rng, (M, 1)) / 50, random_scales(rng, (32,)) / 50, randn(9, (32,))

    def f(*floats):
        y = scaled_matmul(
            lhs,
            rhs,
            *floats,
            activation="gelu",
            out_dtype=jnp.float32,
            implementation=implementation,
        )
        return jnp.sum(jnp.sin(y))

    def want(lhs_scale, rhs_scale, bias):
        with exact:
            y = lhs.astype(jnp.float32) @ rhs.astype(jnp.float32).T
        return jnp.sum(jnp.sin(FUNCTIONS["gelu"](lhs_scale * rhs_scale * y + bias)))

    got, ref = (jax.grad(g, (0, 1, 2))(*floats) for g in (f, want))
    for a, b in zip(got, ref, strict=True):
        np.testing.assert_allclose(a, b, rtol=CLOSE["rtol"], atol=CLOSE["rtol"] * np.abs(b).max())
    # dtype has the last word: JAX itself offers no tangent of e4m3 but through jvp.
    with pytest.raises(TypeError, match="operands of this product are float8_e4m3fn"):
        jax.jvp(
            lambda lhs: scaled_matmul(lhs, rhs, *floats, implementation=implementation),
            (lhs,),
            (jnp.ones_like(lhs),),
        )


@implementations
@activations
def test_float_weights_get_the_gradients_of_a_dense_layer(activation, implementation):
    """They differ from nn.Dense's only through the pre-activation, which FP8 rounds."""

    def f(x, w, bias):
        return fp8_dense_float(x, w, bias, activation=activation, implementation=implementation)

    def nn_dense(x, w, bias):
        return FUNCTIONS[activation](x @ w + bias)

    cotangent = randn(10, (M, N))
    value, pull = jax.vjp(f, X, W, BIAS)
    with exact:
        wanted, wanted_pull = jax.vjp(nn_dense, X, W, BIAS)
        ref = wanted_pull(cotangent)
    got = jax.jit(pull)(cotangent)
    # x and w are each rounded to 3 bits: an rms of 2^-4/sqrt(12) * 1.5 = 0.027 of each product, and
    # together 0.04, which is the error of the value, the slope of smooth activations halving it.
    # relu's slope flips where the rounding changes the sign of the pre-activation: where it is
    # within 4 % of a deviation of 0, so for 1.5 % of the outputs, and their share in norm is its
    # root. Without an activation nothing of the forward pass is left in the gradient.
    allowed = {None: CLOSE["rtol"], "relu": 0.3}.get(activation, 0.04)
    assert relative_error(value, wanted) < 0.05
    for a, b in zip(got, ref, strict=True):
        assert a.dtype == b.dtype
        assert relative_error(a, b) < allowed


def relative_error(a, b) -> float:
    return float(np.linalg.norm(np.asarray(a) - b) / np.linalg.norm(b))


@implementations
def test_a_step_of_training_with_float_weights(implementation):
    """Straight-through gradients train: least squares through the FP8 layer."""
    w_true = randn(11, (K, N))
    x = randn(12, (256, K))
    y = x @ w_true

    @jax.jit
    def step(w):
        def loss(w):
            return jnp.mean((fp8_dense_float(x, w, implementation=implementation) - y) ** 2)

        value, grad = jax.value_and_grad(loss)(w)
        return w - 10.0 * grad, value

    w, losses = jnp.zeros((K, N)), []
    for _ in range(30):
        w, value = step(w)
        losses.append(float(value))
    # The floor is FP8's own error: (0.04)^2 of the variance K of y.
    assert losses[0] > 20 and losses[-1] < 2 * 0.04**2 * K
