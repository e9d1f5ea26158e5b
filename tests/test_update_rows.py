"""update_rows: some rows of a kernel are new, with their scales; the rest keeps its bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from update_cases import assert_padding_holds, assert_same_bits, devices, weight

import jaxfp8._rows
from jaxfp8 import DenseWeight, FP8Weight, PaddedKernel, quantize, update_rows


K, N = 18, 43

# What a weight may be given as; each quantizes to the same bits as the float it came from.
FORMS = {
    "numpy": lambda w: w,
    "jax": jnp.asarray,
    "out_in": lambda w: DenseWeight(np.swapaxes(w, -1, -2), "out_in"),
    "fp8 in_out": lambda w: FP8Weight(
        quantize(w, axis=-2)[0], quantize(w, axis=-2, keepdims=False)[1], "in_out"
    ),
    "fp8 out_in": lambda w: FP8Weight(
        *quantize(np.swapaxes(w, -1, -2), axis=-1, keepdims=False), "out_in"
    ),
    "padded": PaddedKernel.from_dense,
}


def bits(array) -> np.ndarray:
    return np.array(jnp.copy(array)).view(np.uint8 if array.dtype.itemsize == 1 else np.uint32)


PLACES = [(0, 16), (16, 16), (3, 7), (42, 1), (11, 32), (0, N)]


@pytest.mark.parametrize(
    ("form", "stack", "start", "rows"),
    [
        *(("numpy", (), *place) for place in PLACES),
        *((form, (), 3, 7) for form in FORMS),
        *((form, (2, 3), 11, 32) for form in ("numpy", "out_in", "fp8 out_in")),
    ],
)
def test_rows_are_those_of_a_kernel_built_anew(form, stack, start, rows):
    old, new = weight(*stack, K, N), weight(*stack, K, rows, seed=1)
    kernel = PaddedKernel.from_dense(old)
    updated = update_rows(kernel, start, FORMS[form](new))
    old[..., start : start + rows] = new
    assert_same_bits(updated, PaddedKernel.from_dense(old))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(kernel))


def test_the_rest_keeps_its_bits_and_the_padding_is_written_anew():
    """Random bytes everywhere, NaN and -0 among them: nothing but rows 5 to 12 and padding."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (48, 32), np.uint8)
    scales = rng.integers(0, 2**32, 48, np.uint32)
    kernel = PaddedKernel(
        jnp.asarray(codes.view(jnp.float8_e4m3fn)), jnp.asarray(scales.view(np.float32)), K, N
    )
    w = weight(K, 7)
    updated = update_rows(kernel, 5, w)
    fresh = PaddedKernel.from_dense(w)
    codes[5:12], scales[5:12] = bits(fresh.qvalue)[:7], bits(fresh.scale)[:7]
    codes[N:], scales[N:] = 0, np.float32(1).view(np.uint32)
    np.testing.assert_array_equal(bits(updated.qvalue), codes)
    np.testing.assert_array_equal(bits(updated.scale), scales)


def test_a_scale_per_tensor_becomes_that_of_the_rows():
    """vLLM requantizes such shards to the largest scale through float16, past 65504 from 146 on."""
    kernel = PaddedKernel.from_dense(weight(K, N))
    value = jnp.asarray(weight(K, 9), jnp.float8_e4m3fn)
    updated = update_rows(kernel, 20, FP8Weight(value, np.float32(150.0)))
    np.testing.assert_array_equal(jnp.copy(updated.scale)[20:29], np.full(9, 150, np.float32))
    np.testing.assert_array_equal(bits(updated.qvalue)[20:29, :K], bits(value.T))
    assert_padding_holds(updated)


def test_under_jit_and_abstractly():
    kernel, w = PaddedKernel.from_dense(weight(K, N)), weight(K, 7, seed=2)
    expected = update_rows(kernel, 8, w)
    assert_same_bits(jax.jit(lambda k, w: update_rows(k, 8, w))(kernel, w), expected)
    shapes = jax.eval_shape(lambda k, w: update_rows(k, 8, w), kernel, w)
    assert shapes.qvalue.shape == (48, 32) and shapes.out_features == N
    assert update_rows(kernel, np.int64(8), w).in_features == K
    # A NaN under a trace: the rule of quantize, for its channel alone.
    w[3, 2] = np.nan
    traced = jax.jit(lambda k, w: update_rows(k, 8, w))(kernel, w)
    assert np.isnan(traced.scale).tolist() == [row == 10 for row in range(48)]


def test_one_program_for_all_starts():
    kernel, w = PaddedKernel.from_dense(weight(K, N)), weight(K, 6)
    update_rows(kernel, 0, w)
    size = jaxfp8._rows._update._cache_size()
    for start in (1, 8, 37):
        update_rows(kernel, start, w)
    assert jaxfp8._rows._update._cache_size() == size


def test_the_result_lies_where_the_kernel_does():
    kernel = jax.device_put(PaddedKernel.from_dense(weight(K, N)), devices()[2])
    for make in (np.asarray, jnp.asarray, lambda w: jax.device_put(w, devices()[1])):
        updated = update_rows(kernel, 3, make(weight(K, 6)))
        assert [a.sharding for a in jax.tree.leaves(updated)] == [kernel.qvalue.sharding] * 2
        assert updated.qvalue.committed


NAN = np.full((K, 3), np.nan, np.float32)


@pytest.mark.parametrize(
    ("start", "w", "error", "pattern"),
    [
        (-1, weight(K, 3), ValueError, "`start` is -1, but the kernel has rows 0 to 43"),
        (41, weight(K, 3), ValueError, "has 3 rows and `start` is 41"),
        (0, weight(K, 44), ValueError, "has 44 rows"),
        (0, np.zeros((K, 0), np.float32), ValueError, "has 0 rows"),
        (0, weight(K - 1, 3), ValueError, r"its shape is \(17, 3\).*\(18, 3\)"),
        (0, weight(3), ValueError, "must have 2 axes"),
        (0, np.float32(1), ValueError, "must have 2 axes"),
        (0, np.zeros((K, 3), np.int32), TypeError, "int32"),
        (0, "w", TypeError, "is a str, not an array"),
        (0, NAN, ValueError, "a NaN or an infinity"),
        (0.0, weight(K, 3), TypeError, "`start` must be an int"),
        (0, FP8Weight(jnp.ones((K, 3), jnp.float8_e4m3fn), 0.0), ValueError, "not positive"),
    ],
)
def test_what_does_not_fit(start, w, error, pattern):
    with pytest.raises(error, match=pattern):
        update_rows(PaddedKernel.from_dense(weight(K, N)), start, w)


def test_kernels_that_have_no_rows_of_their_own():
    per_tensor = PaddedKernel.from_dense(weight(K, N), per_channel=False)
    with pytest.raises(ValueError, match="one scale per tensor, and rows .* per_channel=True"):
        update_rows(per_tensor, 0, weight(K, 3))
    with pytest.raises(TypeError, match="`kernel` must be a PaddedKernel"):
        update_rows(weight(K, N), 0, weight(K, 3))
