"""Quantized inputs under jit, vmap, scan and grad, and the calls that are left of them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CLOSE, check_quantized, cuda_text, implementations, randn

from jaxfp8 import PaddedKernel, QuantizedInput, fp8_dense, quantize_input
from jaxfp8.quantize import FP8_DTYPE


K, N = 33, 50
KERNEL = PaddedKernel.from_dense(randn(0, (K, N)) / 6)
BACK = PaddedKernel.from_dense(randn(1, (N, K)) / 7)
STACK = PaddedKernel.from_dense(randn(2, (3, K, N)) / 6)
BIAS = randn(3, (N,))
SCALE = np.float32(0.02)
to_float32 = functools.partial(fp8_dense, out_dtype=jnp.float32)
CALL = "stablehlo.custom_call @jaxfp8_"
SLACK = 4 * CLOSE["atol"]  # of float32 results near 1, before they are rounded to e4m3


def calls(f, *args):
    """How often each of our targets is called in a program for CUDA, and its loops."""
    text = cuda_text(f, *args)
    names = ("quantize_v1", "scaled_matmul_v1", "dense_v1")
    return *(text.count(CALL + name) for name in names), text.count("stablehlo.while")


def assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


# What a program holds


def test_three_layers_share_one_quantize_call():
    def attention(x, q, k, v):
        x = quantize_input(x)
        return [fp8_dense(x, kernel) for kernel in (q, k, v)]

    x = randn(4, (2, 5, K), jnp.bfloat16)
    assert calls(attention, x, KERNEL, KERNEL, KERNEL) == (1, 3, 0, 0)
    # Without it each layer quantizes: an opaque call is not a common subexpression.
    assert calls(lambda x: [fp8_dense(x, KERNEL) for _ in range(3)], x) == (0, 0, 3, 0)


def test_a_chain_quantizes_once():
    def chain(x):
        hidden = fp8_dense(x, KERNEL, BIAS, activation="gelu", out_scale=SCALE)
        hidden = fp8_dense(hidden, BACK, activation="gelu", out_scale=SCALE)
        return fp8_dense(hidden, KERNEL, BIAS)

    x = randn(5, (7, K))
    assert calls(chain, x) == (0, 2, 1, 0)
    text = cuda_text(chain, x)
    # The codes go from call to call at their padded width, and nothing is padded or sliced.
    for moved in ("pad", "slice", "concatenate", "transpose", "convert"):
        assert f"stablehlo.{moved}" not in text
    results = re.findall(r"custom_call @jaxfp8_.*-> \(?(tensor<[^>]*>)", text)
    assert results == ["tensor<7x64xf8E4M3FN>", "tensor<7x48xf8E4M3FN>", f"tensor<7x{N}xbf16>"]
    assert f"out_features = {N} : i64" in text and f"out_features = {K} : i64" in text


def test_the_call_takes_scales_as_they_are():
    """A scale for each row, or one; the quantize call gives the second no results of its own."""
    x = randn(6, (7, K))
    text = cuda_text(lambda x: to_float32(quantize_input(x), KERNEL), x)
    assert "tensor<7x48xf8E4M3FN>, tensor<64x48xf8E4M3FN>, tensor<7x1xf32>, tensor<64xf32>" in text
    text = cuda_text(lambda x: to_float32(quantize_input(x, x_scale=SCALE), KERNEL), x)
    assert "tensor<7x48xf8E4M3FN>, tensor<64x48xf8E4M3FN>, tensor<f32>, tensor<64xf32>" in text


@implementations
def test_jit_and_eval_shape(implementation):
    def f(x):
        options = dict(implementation=implementation)
        qx = quantize_input(x, **options)
        return qx, to_float32(qx, KERNEL, BIAS, **options), quantize_input(x, x_scale=SCALE)

    x = randn(7, (2, 5, K))
    shapes = jax.eval_shape(f, x)
    assert isinstance(shapes[0], QuantizedInput) and shapes[0].features == K
    assert shapes[0].shape == (2, 5, K) and shapes[0].qvalue.dtype == FP8_DTYPE
    got, want = jax.jit(f)(x), f(x)
    assert_equal((got[0], got[2]), (want[0], want[2]))
    np.testing.assert_allclose(got[1], want[1], **CLOSE)
    assert jax.tree.structure(got) == jax.tree.structure(shapes)
    for a, spec in zip(jax.tree.leaves(got), jax.tree.leaves(shapes), strict=True):
        assert (a.shape, a.dtype) == (spec.shape, spec.dtype)


def test_the_width_is_part_of_the_program():
    """18 and 20 pad to the same 32, and are two programs: nothing is derived from a buffer."""
    f = jax.jit(lambda qx, kernel: to_float32(qx, kernel))
    for k in (18, 20):
        f(quantize_input(randn(8, (4, k))), PaddedKernel.from_dense(randn(9, (k, N))))
    assert f._cache_size() == 2
    narrow = quantize_input(randn(8, (4, 18)))
    with pytest.raises(ValueError, match=r"`x` must have 20 features.*\(4, 18\)"):
        f(narrow, PaddedKernel.from_dense(randn(9, (20, N))))


def test_tree_map_takes_rows_and_any_object():
    x = randn(10, (6, K))
    qx = quantize_input(x)
    rows = jax.tree.map(lambda a: a[2:4], qx)
    np.testing.assert_allclose(to_float32(rows, KERNEL), to_float32(x[2:4], KERNEL), **CLOSE)
    named = jax.tree.map(lambda a: "leaf", qx)
    assert (named.qvalue, named.scale, named.features) == ("leaf", "leaf", K)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(qx)]
    assert paths == [".qvalue", ".scale"]


@implementations
def test_scan_carries_a_quantized_input(implementation):
    stack = PaddedKernel.from_dense(randn(11, (4, K, K)) / 6)
    first = quantize_input(randn(12, (5, K)), x_scale=SCALE)

    def step(carry, kernel):
        options = dict(activation="silu", out_scale=SCALE, implementation=implementation)
        return fp8_dense(carry, kernel, **options), carry.dequantize()[:, 0]

    got, seen = jax.jit(lambda *args: jax.lax.scan(step, *args))(first, stack)
    want, columns = first, []
    for i in range(4):
        want, column = step(want, jax.tree.map(lambda a, i=i: a[i], stack))
        columns.append(column)
    assert (got.features, got.scale) == (K, SCALE)
    # One e4m3 step is an eighth at most, and another order of sums may cause it.
    assert np.mean(np.asarray(got.qvalue != want.qvalue)) < 0.02
    np.testing.assert_allclose(got.dequantize(), want.dequantize(), rtol=0.15, atol=SCALE / 64)
    np.testing.assert_allclose(seen, np.stack(columns), rtol=0.15, atol=SCALE / 64)


# vmap


@pytest.mark.parametrize(
    ("in_axes", "rows"),
    [(0, (4, 5)), (1, (5, 4)), (QuantizedInput(0, 0, K), (4,))],
    ids=["first", "second", "vectors"],
)
def test_vmap_over_rows_is_one_call(in_axes, rows):
    x = randn(13, (*rows, K))
    qx = quantize_input(x)
    f = jax.vmap(to_float32, in_axes=(in_axes, None, None))
    assert calls(f, qx, KERNEL, BIAS) == (0, 1, 0, 0)
    want = to_float32(qx, KERNEL, BIAS)
    want = np.swapaxes(want, 0, 1) if in_axes == 1 else want
    np.testing.assert_allclose(f(qx, KERNEL, BIAS), want, **CLOSE)


def test_vmap_over_rows_of_one_static_scale_is_one_call():
    x = randn(14, (4, 5, K))
    qx = quantize_input(x, x_scale=SCALE)
    f = jax.vmap(to_float32, in_axes=(QuantizedInput(0, None, K), None))
    assert calls(f, qx, KERNEL) == (0, 1, 0, 0)
    np.testing.assert_allclose(f(qx, KERNEL), to_float32(x, KERNEL, x_scale=SCALE), **CLOSE)
    # A scale for each example is no row: a loop, of the right values.
    scales = np.float32([0.02, 0.5, 1.0, 0.01])
    each = jax.vmap(lambda x, s: quantize_input(x, x_scale=s))
    separate = each(x, scales)
    assert separate.scale.shape == (4,) and calls(each, x, scales)[::3] == (1, 1)
    got = jax.vmap(to_float32, in_axes=(0, None))(separate, KERNEL)
    want = [to_float32(a, KERNEL, x_scale=s) for a, s in zip(x, scales, strict=True)]
    np.testing.assert_allclose(got, np.stack(want), **CLOSE)


@pytest.mark.parametrize("shape", [(4, K), (4, 5, K), (4, 2, 3, K), (0, 5, K)], ids=str)
def test_vmap_of_quantize_input_is_one_call(shape):
    x = randn(15, shape)
    f = jax.vmap(quantize_input)
    if 0 not in shape:
        assert calls(f, x) == (1, 0, 0, 0)
        nested = jax.vmap(f) if len(shape) > 3 else jax.jit(f)
        assert calls(nested, x) == (1, 0, 0, 0)
        assert_equal(nested(x), quantize_input(x))
    assert_equal(f(x), quantize_input(x))


def test_vmap_whose_static_scale_must_be_told():
    x = randn(16, (4, 5, K))
    f = functools.partial(quantize_input, x_scale=SCALE)
    told = jax.vmap(f, out_axes=QuantizedInput(0, None, K))
    assert_equal(told(x), f(x))
    assert calls(told, x) == (1, 0, 0, 0)
    # Else it is repeated, and the next layer says what it wants.
    with pytest.raises(ValueError, match=r"`x.scale` must have shape \[\] or \[4, 5, 1\].*\(4,\)"):
        fp8_dense(jax.vmap(f)(x), KERNEL)
    out = functools.partial(fp8_dense, kernel=KERNEL, bias=BIAS, out_scale=SCALE)
    told = jax.vmap(lambda x: out(x), out_axes=QuantizedInput(0, None, N))
    assert calls(told, x) == (0, 0, 1, 0)
    check_quantized(told(x).qvalue, to_float32(x, KERNEL, BIAS), SCALE, slack=SLACK)


def test_vmap_over_kernels_and_out_scales_is_a_loop():
    qx = quantize_input(randn(17, (5, K)))
    layers = [jax.tree.map(lambda a, i=i: a[i], STACK) for i in range(3)]
    got = jax.vmap(to_float32, in_axes=(None, 0))(qx, STACK)
    want = np.stack([to_float32(qx, layer) for layer in layers])
    np.testing.assert_allclose(got, want, **CLOSE)
    scales = np.float32([0.01, 0.02, 0.04])
    got = jax.vmap(lambda layer, s: fp8_dense(qx, layer, out_scale=s))(STACK, scales)
    assert got.scale.shape == (3,)
    for i, scale in enumerate(scales):
        check_quantized(got.qvalue[i], want[i], scale, slack=SLACK)


# Derivatives


@pytest.mark.parametrize(
    ("message", "f", "argument"),
    [
        ("quantized once", lambda x: to_float32(quantize_input(x), KERNEL), randn(18, (4, K))),
        ("quantized once", lambda s: quantize_input(np.ones((4, K)), x_scale=s).dequantize(), 0.1),
        ("A quantized result", lambda x: fp8_dense(x, KERNEL, out_scale=SCALE).dequantize(),
         randn(18, (4, K))),
        ("A quantized result", lambda b: fp8_dense(np.ones((4, K), np.float32), KERNEL, b,
                                                   out_scale=SCALE).dequantize(), BIAS),
        ("A quantized result", lambda s: fp8_dense(np.ones((4, K), np.float32), KERNEL,
                                                   out_scale=s).dequantize(), 0.1),
        ("A quantized result", lambda b: fp8_dense(quantize_input(np.ones((4, K), np.float32)),
                                                   KERNEL, b, out_scale=SCALE).dequantize(), BIAS),
        ("operands of this product", lambda q: to_float32(q, KERNEL),
         quantize_input(randn(18, (4, K)))),
        ("operands of this product.*float `param_dtype`",
         lambda kernel: to_float32(quantize_input(np.ones((4, K), np.float32)), kernel), KERNEL),
    ],
    ids=["x", "x_scale", "out: x", "out: bias", "out: out_scale", "out: bias of quantized x",
         "quantized x", "kernel"],
)  # fmt: skip
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_derivatives_are_refused(wrap, message, f, argument):
    with pytest.raises(TypeError, match=f"(?s){message}.*`jax.lax.stop_gradient`|{message}.*next"):
        jax.grad(wrap(lambda a: f(a).sum()))(argument)
    with pytest.raises(TypeError, match=message):
        jax.jvp(f, (argument,), (jax.tree.map(jnp.ones_like, argument),))


@implementations
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_what_stands_beside_it_has_a_gradient(activation, implementation):
    """The bias of a layer, and what a stopped gradient lets through."""
    x = randn(19, (4, K))
    options = dict(activation=activation, implementation=implementation)
    qx = quantize_input(x, implementation=implementation)

    def loss(bias, x):
        return jnp.sin(to_float32(x, KERNEL, bias, **options)).sum()

    want = jax.grad(loss)(BIAS, x)
    np.testing.assert_allclose(jax.grad(loss)(BIAS, qx), want, **CLOSE)

    def stopped(bias, x):
        return loss(bias, quantize_input(jax.lax.stop_gradient(x), implementation=implementation))

    got = jax.jit(jax.grad(stopped, (0, 1)))(BIAS, x)
    np.testing.assert_allclose(got[0], want, **CLOSE)
    assert (np.asarray(got[1]) == 0).all()
