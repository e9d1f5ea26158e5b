"""Paths and values: all that is wrong is listed in one error, and nothing has changed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from update_cases import addresses, assert_same_bits, served_tree, trainer_tree, weight

from jaxfp8.padded import FP8Weight, PaddedKernel
from jaxfp8.quantize import FP8_DTYPE
from jaxfp8.update import reload_params, update_params


def refuse(error, params, loaded, **options) -> str:
    """Both functions raise the same error, and `params` lives, where and as it was."""
    copy, where = jax.tree.map(jnp.copy, params), addresses(params)
    messages = []
    for function in (update_params, reload_params):
        with pytest.raises(error) as caught:
            function(params, loaded, **options)
        messages.append(str(caught.value))
        assert_same_bits(params, copy)
        assert addresses(params) == where
    assert messages[0] == messages[1]
    assert "nothing has been changed" in messages[0]
    return messages[0]


def test_missing_unexpected_and_mismatched_are_all_listed():
    loaded = trainer_tree()
    del loaded["Dense_0"]["bias"], loaded["LayerNorm_0"]
    loaded["value_head"] = {"kernel": weight(3, 4), "bias": weight(4)}
    loaded["Dense_1"] = {"kernel": weight(10, 100), "bias": np.zeros(10, int)}
    message = refuse(ValueError, served_tree(), loaded)
    assert "Missing in `loaded` (3): Dense_0/bias, LayerNorm_0/bias, LayerNorm_0/scale." in message
    assert "partial=True" in message
    assert "Unexpected in `loaded` (2): value_head/bias, value_head/kernel." in message
    assert "ignore=('value_head/*',)" in message
    assert "Mismatched (2):\n" in message
    assert "\n  Dense_1/bias: the value is int64" in message
    assert "\n  Dense_1/kernel: its shape is (10, 100)" in message


def test_partial_does_not_excuse_unexpected_paths_nor_ignore_missing_ones():
    loaded = trainer_tree() | {"more": weight(2)}
    del loaded["Dense_0"]
    message = refuse(ValueError, served_tree(), loaded, partial=True)
    assert "Unexpected in `loaded` (1): more" in message and "Missing" not in message
    message = refuse(ValueError, served_tree(), loaded, ignore=("*",))
    assert "Missing in `loaded` (2): Dense_0/bias, Dense_0/kernel" in message
    assert "Unexpected" not in message


def test_patterns_match_whole_names():
    loaded = trainer_tree() | {"value_head_2": weight(2)}
    message = refuse(ValueError, served_tree(), loaded, ignore=("value_head", "head*"))
    assert "value_head_2" in message


def test_only_types_wrong_is_a_type_error():
    loaded = trainer_tree()
    loaded["Dense_0"]["kernel"] = loaded["Dense_0"]["kernel"].astype(np.int32)
    loaded["LayerNorm_0"]["scale"] = loaded["LayerNorm_0"]["scale"].astype(np.int32)
    message = refuse(TypeError, served_tree(), loaded)
    assert "Mismatched (2)" in message


@pytest.mark.parametrize(
    ("params", "loaded", "hint"),
    [
        (served_tree, lambda: {"params": trainer_tree()}, "loaded['params']?"),
        (lambda: {"params": served_tree()}, trainer_tree, "{'params': loaded}?"),
    ],
)
def test_a_forgotten_params_level_is_hinted(params, loaded, hint):
    assert f"Did you mean to pass {hint}" in refuse(ValueError, params(), loaded())


def test_a_padded_state_dict_is_not_a_weight():
    """What `flax.serialization` makes of a PaddedKernel is restored, not loaded."""
    import flax.serialization

    params = served_tree()
    message = refuse(ValueError, params, flax.serialization.to_state_dict(served_tree()))
    assert "Missing in `loaded` (2): Dense_0/kernel, Dense_1/kernel" in message
    assert "Dense_0/kernel/qvalue" in message


def test_a_single_kernel_is_a_tree_too():
    message = refuse(ValueError, PaddedKernel.from_dense(weight(18, 20)), weight(20, 18))
    assert "(the tree itself): its shape is (20, 18)" in message


def test_abstract_leaves_that_stay_without_values():
    abstract = jax.eval_shape(served_tree)
    loaded = trainer_tree()
    del loaded["Dense_0"]
    with pytest.raises(ValueError, match="partial=True"):
        update_params(abstract, loaded)
    pattern = r"abstract in `params`.*\(2\): Dense_0/bias, Dense_0/kernel"
    with pytest.raises(ValueError, match=pattern):
        update_params(abstract, loaded, partial=True)
    params = {"kernel": PaddedKernel.from_dense(weight(18, 20)), "x_scale": jnp.float32(1)}
    with pytest.raises(ValueError, match=r"abstract in `params`.*\(1\): x_scale"):
        update_params(jax.eval_shape(lambda: params), {"kernel": weight(18, 20)})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_weights_are_all_listed(bad):
    """In every position of a reduction: XLA's CPU maximum of jax 0.10.2 loses NaN."""
    loaded = trainer_tree()
    loaded["Dense_0"]["kernel"][63, 99] = bad
    loaded["Dense_1"]["kernel"][0, 0] = bad
    loaded["LayerNorm_0"]["bias"][7] = bad
    message = refuse(ValueError, served_tree(), loaded)
    for path in ("Dense_0/kernel", "Dense_1/kernel", "LayerNorm_0/bias"):
        assert f"\n  {path}: a weight is NaN or infinite" in message
    assert message.count("NaN or infinite (") == 3
    refuse(ValueError, served_tree(per_channel=False), loaded)
    refuse(ValueError, served_tree(), jax.tree.map(jnp.asarray, loaded))


OVERFLOWS = [(jnp.float16, 65520.0, 65519.0), (jnp.bfloat16, 3.3962e38, 3.396e38)]


@pytest.mark.parametrize(("dtype", "over", "within"), OVERFLOWS)
def test_a_value_that_overflows_the_parameter(dtype, over, within):
    """In its dtype: also where XLA would compute in float32, as it may on a GPU."""
    params = {"norm": jnp.ones(3, dtype)}
    message = refuse(ValueError, params, {"norm": np.array([1.0, -over, 1.0], np.float32)})
    assert "norm: a weight is NaN or infinite (in the parameter's dtype)" in message
    if dtype == jnp.float16:
        wide = jnp.array([1.0, 1e5, 1.0], jnp.bfloat16)  # of 16 bits too
        assert "norm: a weight is NaN or infinite" in refuse(ValueError, params, {"norm": wide})
    large = np.array([1.0, -within, 1.0], np.float32)
    np.testing.assert_array_equal(
        update_params(params, {"norm": large})["norm"], large.astype(dtype)
    )


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "over", "within"), OVERFLOWS)
def test_a_value_that_overflows_the_parameter_on_a_gpu(dtype, over, within):
    test_a_value_that_overflows_the_parameter(dtype, over, within)


def fp8(value: np.ndarray, scale) -> FP8Weight:
    return FP8Weight(value.astype(FP8_DTYPE), np.asarray(scale, np.float32))


@pytest.mark.parametrize("bad", [0.0, -0.0, -1.0, np.nan, np.inf, -np.inf, 1e-40, -1e-40])
@pytest.mark.parametrize("allow", [False, True])
def test_scales_that_are_not_positive_and_finite(bad, allow):
    params = {"kernel": PaddedKernel.from_dense(weight(18, 20)), "x_scale": jnp.float32(2)}
    value = np.ones((18, 20), np.float32)
    channels = np.ones(20)
    channels[19] = bad
    clean = PaddedKernel.from_dense(value)
    padded = PaddedKernel(clean.qvalue, clean.scale.at[19].set(bad), 18, 20)
    options = {"allow_nonfinite": True} if allow else {}
    for loaded, path in (
        ({"kernel": fp8(value, bad), "x_scale": np.float32(2)}, "kernel"),
        ({"kernel": fp8(value, channels), "x_scale": np.float32(2)}, "kernel"),
        ({"kernel": padded}, "kernel"),
        ({"kernel": value, "x_scale": np.float32(bad)}, "x_scale"),
    ):
        copy = jax.tree.map(jnp.copy, params)
        with pytest.raises(ValueError, match=f"  {path}: a scale is not positive") as caught:
            reload_params(params, loaded, **options)
        assert "NaN or infinite (" not in str(caught.value)
        assert_same_bits(params, copy)
    assert "a scale is not positive" in refuse(ValueError, params, loaded | {"x_scale": bad})


@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("position", [(0, 0), (17, 19)])
def test_nan_codes_in_a_quantized_weight(code, position):
    codes = np.full((18, 20), 0x38, np.uint8)
    codes[position] = code
    value = codes.view(FP8_DTYPE)
    params = {"kernel": PaddedKernel.from_dense(weight(18, 20))}
    message = refuse(ValueError, params, {"kernel": FP8Weight(value, np.float32(1.0))})
    assert "kernel: a weight is NaN" in message
    loaded = PaddedKernel.from_dense(weight(18, 20))
    planted = loaded.qvalue.at[position[::-1]].set(jnp.nan)
    refuse(ValueError, params, {"kernel": PaddedKernel(planted, loaded.scale, 18, 20)})
    kept = reload_params(
        params, {"kernel": FP8Weight(value, np.float32(1.0))}, allow_nonfinite=True
    )
    assert np.isnan(kept["kernel"].dequantize()).sum() == 1
