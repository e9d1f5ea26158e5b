"""`jax.export` for CPU and CUDA in one artefact, with symbolic rows, and no GPU needed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CLOSE, bits, check_quantized, randn
from jax import export

from jaxfp8 import (
    PaddedKernel,
    QuantizedInput,
    export_safety_checks,
    fp8_dense,
    quantize_input,
    scaled_matmul,
)
from jaxfp8.quantize import quantize


K, N = 33, 50
BIAS = randn(1, (N,))


def params_of(seed):
    return {"kernel": PaddedKernel.from_dense(randn(seed, (K, N))), "bias": BIAS}


def serve(params, x):
    return fp8_dense(x, params["kernel"], params["bias"], activation="gelu")


def exported(f, *specs, platforms=("cpu", "cuda")):
    """Through bytes and back, as another process would load it."""
    artefact = export.export(
        jax.jit(f), platforms=platforms, disabled_checks=export_safety_checks()
    )(*specs)
    assert tuple(artefact.platforms) == platforms
    return export.deserialize(artefact.serialize())


def specs_of(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


def rows(shape):
    return jax.ShapeDtypeStruct(export.symbolic_shape(shape), jnp.float32)


@pytest.mark.parametrize(
    ("symbolic", "shapes"),
    [
        (f"b, {K}", [(1, K), (7, K), (300, K)]),
        (f"b, t, {K}", [(1, 1, K), (4, 5, K)]),
        (f"3, b, t, {K}", [(3, 2, 1, K)]),
    ],
)
def test_one_artefact_of_symbolic_batch(symbolic, shapes):
    params = params_of(0)
    artefact = exported(serve, specs_of(params), rows(symbolic))
    text = artefact.mlir_module()
    assert text.count("@jaxfp8_dense_v1") == 1 and "dot_general" in text
    for shape in shapes:
        x = randn(2, shape)
        got = artefact.call(params, x)
        assert got.shape == (*shape[:-1], N)
        np.testing.assert_allclose(got, serve(params, x), **CLOSE)
    # Other weights, same artefact: they are inputs, not constants.
    other = params_of(3)
    x = randn(4, shapes[-1])
    np.testing.assert_allclose(jax.jit(artefact.call)(other, x), serve(other, x), **CLOSE)


def test_params_of_another_logical_size_are_refused():
    artefact = exported(serve, specs_of(params_of(0)), rows(f"b, {K}"))
    wide = {"kernel": PaddedKernel.from_dense(randn(5, (K + 1, N))), "bias": BIAS}
    assert wide["kernel"].qvalue.shape == params_of(0)["kernel"].qvalue.shape
    with pytest.raises(ValueError, match="tree structure"):
        artefact.call(wide, randn(6, (2, K)))


def test_the_kernel_survives_as_an_output():
    artefact = exported(lambda params: params, specs_of(params_of(0)))
    kernel = artefact.call(params_of(0))["kernel"]
    assert isinstance(kernel, PaddedKernel)
    assert (kernel.in_features, kernel.out_features) == (K, N)
    np.testing.assert_array_equal(kernel.dequantize(), params_of(0)["kernel"].dequantize())


def test_without_the_safety_checks_jax_refuses():
    with pytest.raises(ValueError, match="custom call.*jaxfp8_dense_v1|jaxfp8_dense_v1"):
        export.export(jax.jit(serve), platforms=("cpu", "cuda"))(
            specs_of(params_of(0)), jax.ShapeDtypeStruct((4, K), jnp.float32)
        )


def test_vmap_and_grad_export():
    params = params_of(0)
    x = randn(7, (4, 5, K))
    batched = jax.vmap(serve, in_axes=(None, 0))
    artefact = exported(batched, specs_of(params), rows(f"b, t, {K}"))
    assert artefact.mlir_module().count("@jaxfp8_dense_v1") == 1
    np.testing.assert_allclose(artefact.call(params, x), batched(params, x), **CLOSE)
    gradient = jax.grad(lambda x, params: serve(params, x).sum())
    artefact = exported(gradient, rows(f"b, t, {K}"), specs_of(params))
    np.testing.assert_allclose(artefact.call(x, params), gradient(x, params), **CLOSE)


def test_scaled_matmul_exports():
    f = functools.partial(scaled_matmul, out_dtype=jnp.float32)
    lhs, lhs_scale = quantize(randn(8, (6, 48)), axis=-1)
    rhs, rhs_scale = quantize(randn(9, (32, 48)), axis=-1, keepdims=False)
    (b,) = export.symbolic_shape("b")
    artefact = exported(
        f,
        jax.ShapeDtypeStruct((b, 48), lhs.dtype),
        specs_of(rhs),
        jax.ShapeDtypeStruct((b, 1), jnp.float32),
        specs_of(rhs_scale),
    )
    assert artefact.mlir_module().count("@jaxfp8_scaled_matmul_v1") == 1
    got = artefact.call(lhs, rhs, lhs_scale, rhs_scale)
    np.testing.assert_allclose(got, f(lhs, rhs, lhs_scale, rhs_scale), **CLOSE)


@pytest.mark.parametrize(("platform", "calls"), [("cpu", 0), ("cuda", 1)])
def test_an_artefact_for_one_platform(platform, calls):
    spec = jax.ShapeDtypeStruct((4, K), jnp.float32)
    artefact = exported(serve, specs_of(params_of(0)), spec, platforms=(platform,))
    assert artefact.mlir_module().count("@jaxfp8_dense_v1") == calls


@pytest.mark.parametrize("precision", ["default", "highest"])
def test_naming_cutlass_exports_for_cuda_from_any_machine(precision):
    f = functools.partial(fp8_dense, implementation="cutlass", precision=precision)
    spec = jax.ShapeDtypeStruct((4, K), jnp.float32)
    artefact = exported(f, spec, specs_of(params_of(0)["kernel"]), platforms=("cuda",))
    text = artefact.mlir_module()
    assert text.count("@jaxfp8_dense_v1") == 1 and "dot_general" not in text
    assert f"promoted = {int(precision == 'highest')} : i32" in text


def test_inputs_quantized_once_and_by_the_layer_before():
    scale = np.float32(0.02)
    params = {"up": params_of(0)["kernel"], "down": PaddedKernel.from_dense(randn(10, (N, K)) / 7)}

    def block(x, params):
        qx = quantize_input(x)
        gate, up = (fp8_dense(qx, params["up"], out_dtype=jnp.float32) for _ in range(2))
        hidden = fp8_dense(x, params["up"], activation="gelu", out_scale=scale)
        return qx, gate * up, hidden, fp8_dense(hidden, params["down"], out_dtype=jnp.float32)

    artefact = exported(block, rows(f"b, t, {K}"), specs_of(params))
    text = artefact.mlir_module()
    names = ("quantize_v1", "scaled_matmul_v1", "dense_v1")
    assert [text.count("@jaxfp8_" + name) for name in names] == [1, 3, 1]
    for shape in ((1, 1, K), (4, 5, K)):
        x = randn(11, shape)
        (qx, product, hidden, y), want = artefact.call(x, params), block(x, params)
        assert isinstance(qx, QuantizedInput) and (qx.shape, hidden.features) == (shape, N)
        np.testing.assert_array_equal(bits(qx.qvalue), bits(want[0].qvalue))
        np.testing.assert_array_equal(bits(qx.scale), bits(want[0].scale))
        np.testing.assert_allclose(product, want[1], rtol=1e-2, atol=1e-2)
        unrounded = fp8_dense(x, params["up"], activation="gelu")
        check_quantized(hidden.qvalue, unrounded, scale, slack=20 * CLOSE["atol"])
        again = fp8_dense(hidden, params["down"], out_dtype=jnp.float32)
        np.testing.assert_allclose(y, again, **CLOSE)


def test_a_quantized_input_given_to_an_artefact():
    kernel, qx = params_of(0)["kernel"], quantize_input(randn(12, (4, K)))
    artefact = exported(fp8_dense, specs_of(qx), specs_of(kernel))
    y, want = artefact.call(qx, kernel), fp8_dense(qx, kernel)
    np.testing.assert_allclose(np.float32(y), np.float32(want), rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match="tree structure"):
        artefact.call(QuantizedInput(qx.qvalue, qx.scale, K + 1), kernel)
