"""The faults of vLLM's weight reload, each as a test with values.

The numbers are those of vLLM's `padded_weight_loader` (vllm-project/vllm #43261, #43268, #43289,
#43291, #47005, #50523): what it got wrong is said in each test.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from update_cases import addresses, assert_padding_holds, assert_same_bits, host_bits, weight

from jaxfp8.matmul import fp8_dense
from jaxfp8.padded import DenseWeight, FP8Weight, PaddedKernel
from jaxfp8.quantize import quantize
from jaxfp8.update import reload_params, update_params


# Unit roundoff of e4m3: 3 mantissa bits, so half of a spacing of 2^-3.
ROUNDING = 2.0**-4
UPDATES = [update_params, reload_params]


def served(k: int, n: int, *, per_channel: bool = True, seed: int = 9) -> dict:
    kernel = PaddedKernel.from_dense(weight(k, n, seed=seed), per_channel=per_channel)
    return {"kernel": kernel, "bias": jnp.zeros(n)}


def trained(k: int, n: int, seed: int = 1) -> dict:
    return {"kernel": weight(k, n, seed=seed), "bias": weight(n, seed=seed)}


def assert_close_to(kernel: PaddedKernel, w: np.ndarray) -> None:
    """Every value within a rounding of e4m3; below its normals within half of the smallest step."""
    step = np.abs(w).max(0 if kernel.per_channel else None, keepdims=True) / 448 * 2.0**-10
    error = np.abs(np.array(kernel.dequantize()) - w)
    assert (error <= np.maximum(ROUNDING * np.abs(w), step) * 1.0001).all()


def output(params: dict, x: np.ndarray) -> np.ndarray:
    return np.asarray(fp8_dense(x, params["kernel"], params["bias"], implementation="xla"))


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("n", [10, 33, 100, 255])
def test_per_channel_scales_where_16_does_not_divide_n(update, n):
    """There: the first load of a padded per-channel layer raised (#47005)."""
    loaded = trained(200, n)
    params = update(served(200, n), loaded)
    assert params["kernel"].scale.shape == (-(-n // 16) * 16,)
    assert_close_to(params["kernel"], loaded["kernel"])
    assert_padding_holds(params["kernel"])
    value, scale = quantize(loaded["kernel"].T, axis=-1, keepdims=False)
    assert_same_bits(
        update(params, loaded | {"kernel": FP8Weight(value, scale, "out_in")})["kernel"],
        PaddedKernel.from_dense(loaded["kernel"]),
    )


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("per_channel", [True, False])
def test_a_second_pass_keeps_the_logical_width(update, per_channel):
    """There: the second pass took the padded width for the logical one (#43291)."""
    params, x = served(40, 10, per_channel=per_channel), weight(3, 40)
    for seed in (1, 2, 3):
        loaded = trained(40, 10, seed)
        params = update(params, loaded)
        assert (params["kernel"].in_features, params["kernel"].out_features) == (40, 10)
        y = output(params, x)
        assert y.shape == (3, 10)
        exact = x.astype(np.float64) @ loaded["kernel"] + loaded["bias"]
        terms = np.abs(x).astype(np.float64) @ np.abs(loaded["kernel"])
        # Both factors are rounded to e4m3, and the sum to float32.
        assert (np.abs(y - exact) <= (2 * ROUNDING + ROUNDING**2) * terms + 1e-5).all()


@pytest.mark.parametrize("update", UPDATES)
def test_a_weight_that_is_not_square_the_wrong_way_round(update):
    """There: a reload straight from the checkpoint's [N, K] failed or wrote it transposed."""
    params = served(40, 10)
    copy = jax.tree.map(jnp.copy, params)
    loaded = trained(40, 10)
    turned = loaded | {"kernel": np.ascontiguousarray(loaded["kernel"].T)}
    with pytest.raises(
        ValueError, match=r'transposed weight fits.*DenseWeight\(value, layout="out'
    ):
        update(params, turned)
    assert_same_bits(params, copy)
    declared = turned | {"kernel": DenseWeight(turned["kernel"], "out_in")}
    assert_close_to(update(params, declared)["kernel"], loaded["kernel"])


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("size", [32, 33])
def test_a_square_weight_is_not_guessed(update, size):
    """There: a square weight was transposed silently."""
    loaded = trained(size, size)
    bare = update(served(size, size), loaded)["kernel"]
    assert_close_to(bare, loaded["kernel"])
    turned = update(
        served(size, size), loaded | {"kernel": DenseWeight(loaded["kernel"], "out_in")}
    )["kernel"]
    assert_close_to(turned, loaded["kernel"].T)
    assert np.abs(np.array(turned.dequantize()) - loaded["kernel"]).max() > 1


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("shape", [(40, 9), (39, 10), (32, 10), (1, 1)])
def test_a_smaller_weight_is_refused(update, shape):
    """There: it was written into the corner, and the old tail stayed."""
    params = served(40, 10)
    copy, where = jax.tree.map(jnp.copy, params), addresses(params)
    with pytest.raises(ValueError, match="kernel: its shape is"):
        update(params, {"kernel": weight(*shape), "bias": weight(10)})
    assert_same_bits(params, copy)
    assert addresses(params) == where


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("per_channel", [True, False])
def test_nan_in_the_padding_disappears(update, per_channel):
    """There: padding was never zeroed again (#50523); 0 times NaN poisons every output."""
    params, x = served(40, 10, per_channel=per_channel), weight(3, 40)
    clean = params["kernel"]
    qvalue = clean.qvalue.at[10:, :].set(jnp.nan).at[:, 40:].set(jnp.nan)
    scale = clean.scale.at[10:].set(jnp.nan) if per_channel else clean.scale
    params["kernel"] = PaddedKernel(qvalue, scale, 40, 10)
    assert np.isnan(output(params, x)).all()
    updated = update(params, trained(40, 10))
    assert_padding_holds(updated["kernel"])
    assert np.isfinite(output(updated, x)).all()
    fresh = trained(40, 10)
    fresh["kernel"] = PaddedKernel.from_dense(fresh["kernel"], per_channel=per_channel)
    np.testing.assert_array_equal(output(updated, x), output(fresh, x))


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_scales_are_recomputed(update, per_channel, factor):
    """There: a bfloat16 weight was cast into the fp8 buffer under the old scale."""
    params = served(40, 10, per_channel=per_channel)
    old = np.array(jnp.copy(params["kernel"].scale))
    w = (factor * weight(40, 10, seed=9)).astype(jnp.bfloat16)
    updated = update(params, {"kernel": jnp.asarray(w), "bias": weight(10)})["kernel"]
    assert_close_to(updated, w.astype(np.float32))
    logical = np.s_[:10] if per_channel else ()
    # The same weights but for the factor and bfloat16's rounding, 2^-8.
    ratio = np.array(updated.scale)[logical] / old[logical]
    np.testing.assert_allclose(ratio, factor, rtol=2.0**-8)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize(
    "break_it",
    [
        lambda tree: tree["c"].update(kernel=weight(10, 11)),
        lambda tree: tree["c"]["kernel"].__setitem__((5, 5), np.nan),
        lambda tree: tree["c"].update(bias=np.zeros(10, np.int32)),
        lambda tree: tree["c"].update(kernel=FP8Weight(np.zeros((40, 10)), np.float32(1.0))),
        lambda tree: tree["c"].pop("bias"),
        lambda tree: tree.update(d=weight(2)),
    ],
)
def test_the_last_leaf_at_fault_leaves_the_first_untouched(update, break_it):
    """There: a failure in the middle left a half-written model."""
    params = {name: served(40, 10) for name in "abc"}
    before, where = host_bits(params), addresses(params)
    loaded = {name: trained(40, 10) for name in "abc"}
    break_it(loaded)
    with pytest.raises((ValueError, TypeError), match="nothing has been changed"):
        update(params, loaded)
    assert addresses(params) == where
    for now, then in zip(host_bits(params), before, strict=True):
        np.testing.assert_array_equal(now, then)
