"""Static activation scales in an update: kept where a trainer has none, never left stale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from update_cases import assert_same_bits, weight

from jaxfp8 import (
    DenseWeight,
    FP8Weight,
    KernelShards,
    PaddedKernel,
    reload_params,
    reload_stream,
    update_params,
)
from jaxfp8.quantize import FP8_DTYPE


K, N = 18, 20
KEPT = 3.0


def served():
    kernel = PaddedKernel.from_dense(weight(K, N))
    return {"up": {"kernel": kernel, "x_scale": jnp.float32(KEPT)}}


def quantized(columns: int = N) -> FP8Weight:
    value = weight(K, columns, seed=1).astype(FP8_DTYPE)
    return FP8Weight(value, np.full(columns, 0.5, np.float32), "in_out")


def fused() -> KernelShards:
    return KernelShards({"a": quantized(7), "b": quantized(13)}, {"a": 7, "b": 13})


@pytest.mark.parametrize("update", [update_params, reload_params])
@pytest.mark.parametrize("weights", [quantized, fused])
def test_a_dynamic_checkpoint_into_a_static_layer_is_refused(update, weights):
    """Its x would be quantized by a scale of another model, or by 1, and clipped."""
    params = served()
    before = jax.tree.map(np.array, params)
    with pytest.raises(
        ValueError, match=r"up/x_scale.*static_x_scale=False.*`calibrate`"
    ) as caught:
        update(params, {"up": {"kernel": weights()}})
    assert "Static scales of inputs that a quantized weight in `loaded` does not bring (1)" in str(
        caught.value
    )
    assert_same_bits(params, before)


@pytest.mark.parametrize("update", [update_params, reload_params])
def test_with_partial_the_present_scale_stays(update):
    updated = update(served(), {"up": {"kernel": quantized()}}, partial=True)
    assert updated["up"]["x_scale"] == KEPT
    expected = update_params({"w": served()["up"]["kernel"]}, {"w": quantized()})["w"]
    assert_same_bits(updated["up"]["kernel"], expected)


def test_a_static_checkpoint_brings_its_own():
    loaded = {"up": {"kernel": quantized(), "x_scale": np.float32(0.25)}}
    assert update_params(served(), loaded)["up"]["x_scale"] == 0.25


@pytest.mark.parametrize(
    "trainer", [lambda: weight(K, N, seed=2), lambda: DenseWeight(weight(N, K, seed=2), "out_in")]
)
def test_a_trainer_has_none_and_the_calibrated_one_is_kept(trainer):
    for update in (update_params, reload_params):
        assert update(served(), {"up": {"kernel": trainer()}})["up"]["x_scale"] == KEPT
    padded = {"up": {"kernel": PaddedKernel.from_dense(weight(K, N, seed=2))}}
    assert update_params(served(), padded)["up"]["x_scale"] == KEPT


def test_an_abstract_scale_is_named_once():
    params = jax.eval_shape(served)
    with pytest.raises(ValueError, match="up/x_scale") as caught:
        update_params(params, {"up": {"kernel": quantized()}})
    assert str(caught.value).count("up/x_scale") == 1
    with pytest.raises(ValueError, match=r"abstract in `params`.*up/x_scale"):
        update_params(params, {"up": {"kernel": quantized()}}, partial=True)


def test_under_jit():
    with pytest.raises(ValueError, match="up/x_scale"):
        jax.jit(update_params)(served(), {"up": {"kernel": quantized()}})


@pytest.mark.parametrize("weights", [quantized, fused])
def test_a_stream_wants_the_scale_beside_a_quantized_weight(weights):
    with reload_stream(served()) as stream:
        stream.put("up/kernel", weights())
        assert stream.missing == ("up/x_scale",)
        with pytest.raises(ValueError, match="still hold their old values: up/x_scale"):
            stream.finish()
        stream.put("up/x_scale", np.float32(0.25))
        assert stream.finish()["up"]["x_scale"] == 0.25
    with reload_stream(served()) as stream:
        stream.put("up/kernel", weight(K, N))
        assert stream.finish()["up"]["x_scale"] == KEPT
