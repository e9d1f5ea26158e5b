"""update_params: the values of a kernel, from each form that a weight can have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from update_cases import (
    assert_padding_holds,
    assert_same_bits,
    served_tree,
    trainer_tree,
    weight,
)

from jaxfp8.padded import DenseWeight, FP8Weight, PaddedKernel
from jaxfp8.quantize import FP8_DTYPE, quantize
from jaxfp8.update import update_params


SIZES = [(64, 100), (16, 32), (33, 33)]
STACKS = [(), (2, 3)]


def stale(k: int, n: int, stack: tuple[int, ...] = (), per_channel: bool = True) -> PaddedKernel:
    """A kernel with other weights, and scales that are wrong by a factor of 100."""
    return PaddedKernel.from_dense(100 * weight(*stack, k, n, seed=9), per_channel=per_channel)


def fp8_weight(w: np.ndarray, *, per_channel: bool, layout: str) -> FP8Weight:
    """An FP8Weight of a `[*stack, K, N]` float weight."""
    turned = jnp.swapaxes(w, -1, -2)
    value, scale = quantize(turned, axis=-1 if per_channel else (-2, -1), keepdims=False)
    return FP8Weight(jnp.swapaxes(value, -1, -2) if layout == "in_out" else value, scale, layout)


def reference(loaded: FP8Weight) -> np.ndarray:
    """`value * scale` of an FP8Weight in float32, `[*stack, K, N]`, in numpy."""
    value = np.asarray(loaded.value).astype(np.float32)
    if loaded.layout == "out_in":
        value = np.swapaxes(value, -1, -2)
    scale = np.asarray(loaded.scale).astype(np.float32)
    per_channel = scale.ndim == value.ndim - 1
    return value * (scale[..., None, :] if per_channel else scale[..., None, None])


@pytest.mark.parametrize(("k", "n"), SIZES)
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("per_channel", [True, False])
def test_float_weight_in_either_layout_equals_a_fresh_kernel(k, n, stack, per_channel):
    w = weight(*stack, k, n)
    kernel = stale(k, n, stack, per_channel)
    fresh = PaddedKernel.from_dense(w, per_channel=per_channel)
    turned = np.swapaxes(w, -1, -2)
    for loaded in (w, DenseWeight(w), DenseWeight(turned, "out_in"), jnp.asarray(w)):
        assert_same_bits(update_params(kernel, loaded), fresh)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, np.float64])
def test_other_float_dtypes(dtype):
    w = weight(18, 20).astype(dtype)
    fresh = PaddedKernel.from_dense(w.astype(np.float32))
    assert_same_bits(update_params(stale(18, 20), w), fresh)


@given(
    k=st.integers(1, 80),
    n=st.integers(1, 80),
    per_channel=st.booleans(),
    layout=st.sampled_from(["in_out", "out_in"]),
    exponent=st.integers(-140, 120),
)
@settings(max_examples=20)
def test_twice_is_once_is_fresh(k, n, per_channel, layout, exponent):
    """Invariant 5, bit for bit, tiny and huge weights included."""
    w = np.ldexp(weight(k, n), exponent).astype(np.float32)
    loaded = DenseWeight(w if layout == "in_out" else w.T, layout)
    fresh = PaddedKernel.from_dense(w, per_channel=per_channel)
    once = update_params(stale(k, n, (), per_channel), loaded)
    assert_same_bits(once, fresh)
    assert_same_bits(update_params(once, loaded), fresh)
    assert_padding_holds(once)
    # And back: what a kernel holds, loaded from its own parts, is the same kernel.
    assert_same_bits(update_params(stale(k, n, (), per_channel), once), fresh)


@pytest.mark.parametrize("layout", ["in_out", "out_in"])
def test_a_square_weight_is_taken_by_its_declared_layout(layout):
    w = weight(33, 33)
    loaded = DenseWeight(w, layout)
    expected = PaddedKernel.from_dense(w if layout == "in_out" else w.T)
    assert_same_bits(update_params(stale(33, 33), loaded), expected)
    quantized = fp8_weight(w, per_channel=True, layout="out_in")
    as_declared = FP8Weight(quantized.value, quantized.scale, layout)
    updated = update_params(stale(33, 33), as_declared)
    np.testing.assert_array_equal(updated.dequantize(), reference(as_declared))


@pytest.mark.parametrize(("k", "n"), SIZES)
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("layout", ["in_out", "out_in"])
@pytest.mark.parametrize(("per_channel", "into"), [(True, True), (False, False), (False, True)])
def test_fp8_weight_keeps_its_values(k, n, stack, layout, per_channel, into):
    """Per-tensor scales are repeated into a per-channel kernel; no rounding anywhere."""
    loaded = fp8_weight(weight(*stack, k, n), per_channel=per_channel, layout=layout)
    kernel = stale(k, n, stack, into)
    updated = update_params(kernel, loaded)
    assert updated.per_channel is into and updated.scale.shape == kernel.scale.shape
    np.testing.assert_array_equal(updated.dequantize(), reference(loaded))
    assert_padding_holds(updated)


@pytest.mark.parametrize("into", [True, False])
def test_one_scale_for_a_whole_stack(into):
    value, scale = quantize(weight(2, 18, 20))
    updated = update_params(stale(18, 20, (2,), into), FP8Weight(value, scale))
    expected = np.asarray(value).astype(np.float32) * np.float32(scale)
    np.testing.assert_array_equal(updated.dequantize(), expected)
    assert_padding_holds(updated)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, np.float64])
def test_scales_of_other_float_dtypes_become_float32(dtype):
    value, _ = quantize(weight(18, 20))
    updated = update_params(stale(18, 20), FP8Weight(value, np.full(20, 0.375, dtype)))
    assert updated.scale.dtype == jnp.float32
    np.testing.assert_array_equal(
        updated.dequantize(), np.asarray(value).astype(np.float32) * np.float32(0.375)
    )


@pytest.mark.parametrize(("per_channel", "into"), [(True, True), (False, False), (False, True)])
def test_padded_kernel_is_copied_by_its_logical_part(per_channel, into):
    clean = PaddedKernel.from_dense(weight(18, 20), per_channel=per_channel)
    qvalue = clean.qvalue.at[20:, :].set(jnp.nan).at[:, 18:].set(jnp.nan)
    scale = clean.scale.at[20:].set(-jnp.inf) if per_channel else clean.scale
    updated = update_params(stale(18, 20, (), into), PaddedKernel(qvalue, scale, 18, 20))
    np.testing.assert_array_equal(updated.dequantize(), clean.dequantize())
    assert_padding_holds(updated)
    assert updated.per_channel is into


def test_every_code_of_e4m3_survives():
    """All 254 finite bit patterns, negative zero included."""
    codes = np.array([c for c in range(256) if c & 0x7F != 0x7F], np.uint8).reshape(127, 2)
    loaded = FP8Weight(codes.view(FP8_DTYPE), np.float32(1.0), "out_in")
    updated = update_params(stale(2, 127), loaded)
    np.testing.assert_array_equal(np.asarray(updated.qvalue).view(np.uint8)[:127, :2], codes)


def test_every_leaf_of_a_model():
    params, loaded = served_tree(), trainer_tree()
    updated = update_params(params, loaded)
    assert_same_bits(
        updated["Dense_0"]["kernel"], PaddedKernel.from_dense(trainer_tree()["Dense_0"]["kernel"])
    )
    np.testing.assert_array_equal(updated["Dense_1"]["bias"], loaded["Dense_1"]["bias"])
    np.testing.assert_array_equal(
        updated["LayerNorm_0"]["bias"], loaded["LayerNorm_0"]["bias"].astype(jnp.bfloat16)
    )
    assert_same_bits(params, served_tree())


@pytest.mark.parametrize("loaded_dtype", [jnp.float32, jnp.bfloat16, jnp.float16, np.float64])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_other_leaves_keep_their_dtype(dtype, loaded_dtype):
    x = weight(5).astype(loaded_dtype)
    updated = update_params({"scale": jnp.zeros(5, dtype)}, {"scale": x})
    assert updated["scale"].dtype == dtype
    np.testing.assert_array_equal(updated["scale"], x.astype(np.float32).astype(dtype))


def test_integers_and_booleans_are_copied():
    params = {"step": jnp.int32(3), "on": jnp.zeros(2, bool), "raw": jnp.zeros(2, FP8_DTYPE)}
    loaded = {"step": 7, "on": np.array([True, False]), "raw": jnp.ones(2, FP8_DTYPE)}
    updated = update_params(params, loaded)
    assert updated["step"] == 7 and updated["step"].dtype == jnp.int32
    assert updated["on"].tolist() == [True, False]
    assert updated["raw"].astype(jnp.float32).tolist() == [1.0, 1.0]


def test_a_float_leaf_takes_a_declared_layout():
    w = weight(3, 5)
    params = {"kernel": jnp.zeros((3, 5))}
    for loaded in (DenseWeight(w), DenseWeight(w.T, "out_in")):
        np.testing.assert_array_equal(update_params(params, {"kernel": loaded})["kernel"], w)


def test_float64_is_rounded_once_under_x64():
    with jax.enable_x64(True):
        w = np.random.default_rng(0).normal(size=(18, 20))
        fresh = PaddedKernel.from_dense(w)
        assert_same_bits(update_params(stale(18, 20), w), fresh)
        kept = update_params({"a": jnp.zeros(3, jnp.float64)}, {"a": w[0, :3]})
        np.testing.assert_array_equal(kept["a"], w[0, :3])
