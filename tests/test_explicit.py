"""The operations on a mesh of Explicit axes: values to the bit, and the types of a jnp.dot."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from explicit_cases import (
    FEATURES,
    MESH,
    K,
    assert_typed,
    bias_of,
    compiled,
    kernel_on_mesh,
    mesh_of,
    on_mesh,
    rows,
    ways,
    weight,
)
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxfp8 import (
    PaddedKernel,
    QuantizedInput,
    fp8_dense,
    fp8_dense_float,
    quantize,
    quantize_input,
    scaled_matmul,
)
from jaxfp8 import _explicit_operations as operations


f = functools.partial(fp8_dense, activation="relu")
# How x [4, 8, K], and output and input features of the kernel are split.
SPLITS = {
    "data parallel": (("data",), None, None),
    "two leading axes": (("data", "model"), None, None),
    "both axes on one": ((("data", "model"),), None, None),
    "tensor parallel": ((), "model", None),
    "over all devices": ((), ("data", "model"), None),
    "rows and features": (("data",), "model", None),
    "K of x gathered": (("data", None, "model"), None, None),
    "K of the kernel gathered": (("data",), "model", "data"),
    "only K of x": ((None, None, "model"), None, None),
}
FEW = ("rows and features", "both axes on one", "K of the kernel gathered", "only K of x")
few = pytest.mark.parametrize("split", [SPLITS[name] for name in FEW], ids=FEW)
splits = pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)


def lead(spec):
    """What splits the two leading axes."""
    return [*spec, None, None][:2]


def check_dense(way, n, spec, features, contracted):
    x, w, bias = rows(4, 8), weight(n), bias_of(n)
    kernel = kernel_on_mesh(w, features, contracted)
    y = way(f)(on_mesh(x, *spec), kernel, on_mesh(bias, features))
    like = compiled(jnp.dot)(on_mesh(x, *spec), on_mesh(w, contracted, features))
    assert_typed(y, f(x, PaddedKernel.from_dense(w), bias), jax.typeof(like).sharding.spec)


@ways
@splits
def test_dense_has_the_values_of_one_device_and_the_type_of_a_dot(split, way):
    check_dense(way, 64, *split)


@ways
@pytest.mark.parametrize("n", FEATURES)
def test_padding_lies_on_one_of_the_devices(n, way):
    """The kernel's rows are divided padded, those of the result as they are."""
    check_dense(way, n, ("data",), "model", None)


@few
@pytest.mark.parametrize("per_channel", [True, False])
def test_other_scales_and_dtypes(split, per_channel):
    """One scale for the kernel, a static one for x, other floats, a bias that is nowhere split."""
    spec, features, contracted = split
    x, kernel = rows(4, 8).astype(jnp.bfloat16) / 512, PaddedKernel.from_dense(weight(52))
    if not per_channel:
        kernel = PaddedKernel(kernel.qvalue, kernel.scale[0], K, 52)
    call = functools.partial(fp8_dense, x_scale=jnp.float32(2**-9), out_dtype=jnp.float32)
    placed = PaddedKernel(
        on_mesh(kernel.qvalue, features, contracted), on_mesh(kernel.scale), K, 52
    )
    y = compiled(call)(on_mesh(x, *spec), placed, bias_of(52))
    assert_typed(y, call(x, kernel, bias_of(52)), P(*lead(spec), features))


@few
def test_float_weights(split):
    spec, features, contracted = split
    x, w, bias = rows(4, 8), weight(52), bias_of(52)
    g = functools.partial(fp8_dense_float, activation="relu")
    y = compiled(g)(on_mesh(x, *spec), on_mesh(w, contracted, features), on_mesh(bias, features))
    assert_typed(y, g(x, w, bias), P(*lead(spec), features))


@ways
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("spec", [("data",), ("data", "model"), (None, "data", "model")])
def test_quantized_once(spec, static, way):
    x, kernel = rows(4, 8), PaddedKernel.from_dense(weight(40))
    quantized = functools.partial(quantize_input, x_scale=jnp.float32(1) if static else None)
    want = quantized(x)
    qx = way(quantized)(on_mesh(x, *spec))
    y = way(fp8_dense)(qx, kernel_on_mesh(weight(40)))
    # As `quantize` gives it: of logical width, and K not gathered.
    pair = way(functools.partial(quantize, axis=-1))(on_mesh(x, *spec))
    z = way(fp8_dense)(pair, kernel_on_mesh(weight(40)))
    assert_typed(
        (qx.qvalue, qx.dequantize(), y, z),
        (want.qvalue, want.dequantize(), *[fp8_dense(want, kernel)] * 2),
        *[P(*lead(spec))] * 4,
    )


@ways
@pytest.mark.parametrize(("features", "n"), [(None, 52), ("model", 52), ("model", 40)])
def test_quantized_for_the_next_layer(features, n, way):
    """The features of a quantized result are split where they were; the next layer gathers them."""
    x, w, scale = rows(4, 8) / 512, weight(n), jnp.float32(64)
    w2 = np.ascontiguousarray(weight(n).T)
    up = functools.partial(fp8_dense, out_scale=scale)
    want = up(x, PaddedKernel.from_dense(w))
    h = way(up)(on_mesh(x, "data"), kernel_on_mesh(w, features))
    y = way(fp8_dense)(h, kernel_on_mesh(w2))
    assert isinstance(h, QuantizedInput) and h.features == n
    assert_typed(
        (h.qvalue, h.dequantize(), y),
        (want.qvalue, want.dequantize(), fp8_dense(want, PaddedKernel.from_dense(w2))),
        *[P("data", None, features)] * 2,
        P("data"),
    )


@few
@pytest.mark.parametrize("per_token", [True, False])
def test_scaled_matmul(split, per_token):
    spec, features, contracted = split
    lhs, scale = quantize(rows(4, 8)[..., [*range(K), *[1] * 8]], axis=-1)
    scale = scale if per_token else jnp.float32(1)
    kernel, bias = PaddedKernel.from_dense(weight(40)), bias_of(48)
    y = compiled(scaled_matmul)(
        on_mesh(lhs, *spec),
        on_mesh(kernel.qvalue, features, contracted),
        on_mesh(scale, *(spec[:2] if per_token else ())),
        on_mesh(kernel.scale),
        bias,
    )
    want = scaled_matmul(lhs, kernel.qvalue, scale, kernel.scale, bias)
    assert_typed(y, want, P(*lead(spec), features))


@ways
@pytest.mark.parametrize(
    ("contracted", "features"), [("data", None), (None, "model"), ("data", "model")]
)
def test_kernels_are_made_and_read_where_they_are(contracted, features, way):
    w = weight(52, 3) / 3  # stacked; scales that are not 1
    want = PaddedKernel.from_dense(w)
    kernel = way(PaddedKernel.from_dense)(on_mesh(w, None, contracted, features))
    assert_typed(kernel, want, P(None, features, contracted), P(None, features))
    back = way(PaddedKernel.dequantize)(kernel)
    assert_typed(back, want.dequantize(), P(None, contracted, features))


def test_a_program_for_cuda_gathers_nothing():
    """Each device calls CUTLASS on the rows and the features that it has."""
    n = 64
    kernel = kernel_on_mesh(weight(n), "model")
    with jax.set_mesh(MESH):
        traced = jax.jit(f).trace(on_mesh(rows(8), "data"), kernel, on_mesh(bias_of(n), "model"))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @jaxfp8_dense_v1") == 1
    assert "tensor<4x32xf32>" in text and "tensor<32x48xf8E4M3FN>" in text
    assert "all_gather" not in text and "stablehlo.pad" not in text


def test_an_axis_that_is_auto_is_left_alone():
    mesh = mesh_of(AxisType.Explicit, AxisType.Auto)
    w = weight(64)
    want = f(rows(8), PaddedKernel.from_dense(w))
    with jax.set_mesh(mesh):
        y = jax.jit(f)(on_mesh(rows(8), "data", mesh=mesh), kernel_on_mesh(w, "model", mesh=mesh))
    np.testing.assert_array_equal(y, want)
    assert jax.typeof(y).sharding.spec == P("data", None)


def test_inside_the_users_own_shard_map_and_auto_axes():
    w, x = weight(64), rows(8)
    want = f(x, PaddedKernel.from_dense(w))
    with jax.set_mesh(MESH):
        x, kernel = on_mesh(x, "data"), kernel_on_mesh(w)
        mapped = jax.jit(jax.shard_map(f, out_specs=P("data")))(x, kernel)
        auto = jax.jit(jax.sharding.auto_axes(f, out_sharding=P("data")))(x, kernel)
    assert_typed((mapped, auto), (want, want), P("data"), P("data"))


def test_partial_products_are_summed_as_the_message_says():
    """K split in both operands: refused (bad_input_explicit.py), and this is the remedy."""
    x, w = rows(8), weight(64)[:32]
    x = x[:, :32]
    want = fp8_dense(x, PaddedKernel.from_dense(w), x_scale=jnp.float32(1))

    def local(x, kernel):
        own = PaddedKernel(kernel.qvalue, kernel.scale, 16, 64)
        return jax.lax.psum(fp8_dense(x, own, x_scale=jnp.float32(1)), "model")

    with jax.set_mesh(MESH):
        x, kernel = on_mesh(x, "data", "model"), kernel_on_mesh(w, None, "model")
        y = jax.jit(jax.shard_map(local, out_specs=P("data")))(x, kernel)
    assert_typed(y, want, P("data"))


def test_calls_without_jit_compile_once():
    kernel = kernel_on_mesh(weight(52), "model")
    with jax.set_mesh(MESH):
        before = operations._dense._cache_size()
        for seed in range(3):
            f(on_mesh(rows(8) + seed, "data"), kernel, precision=[None, "highest"])
        assert operations._dense._cache_size() == before + 1
