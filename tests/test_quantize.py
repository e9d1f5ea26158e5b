"""e4m3 numerics: every rounding boundary, saturation, scales, and what happens to NaN and zero."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxfp8.quantize import FP8_DTYPE, INV_FP8_MAX, cast_to_fp8, is_fp8, quantize


def finite_e4m3() -> np.ndarray:
    """All 127 values from 0 to 448, from the definition of the format: bias 7, 3 mantissa bits."""
    subnormal = [m * 2.0**-9 for m in range(8)]
    normal = [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
    return np.array(subnormal + normal[:-1])  # the last pattern, 480, is NaN


def nearest_even(v: np.ndarray) -> np.ndarray:
    """Saturating round to nearest, ties to the even mantissa, by distance in float64."""
    table = finite_e4m3()
    distance = np.abs(np.abs(v.astype(np.float64))[..., None] - table)
    low = distance.argmin(-1)
    high = np.minimum(low + 1, len(table) - 1)
    tie = np.take_along_axis(distance, low[..., None], -1) == np.take_along_axis(
        distance, high[..., None], -1
    )
    index = np.where(tie[..., 0] & (low % 2 == 1), high, low)
    return np.copysign(table[index], v)


def boundaries() -> np.ndarray:
    """Each e4m3 value and each midpoint between neighbours, with one float32 ulp either side."""
    table = finite_e4m3().astype(np.float32)
    centres = np.concatenate([table, (table[1:] + table[:-1]) / 2])
    ulps = [np.nextafter(centres, np.float32(-np.inf)), np.nextafter(centres, np.float32(np.inf))]
    positive = np.abs(np.concatenate([centres, *ulps]))
    return np.concatenate([positive, -positive])


def bits(x: jax.Array) -> np.ndarray:
    return np.asarray(x).view(np.uint8 if x.dtype == FP8_DTYPE else np.uint32)


def test_the_reference_table_is_the_format():
    patterns = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(finite_e4m3(), patterns.astype(np.float64))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_cast_rounds_to_nearest_even_at_every_boundary(wrap):
    x = boundaries()
    got = wrap(cast_to_fp8)(x, jnp.float32(1.0))
    assert got.dtype == FP8_DTYPE
    np.testing.assert_array_equal(np.asarray(got, np.float64), nearest_even(x))
    np.testing.assert_array_equal(bits(got), x.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))


@pytest.mark.parametrize("scale", [2.0**-126, 2.0**-20, 2.0**100])
def test_cast_divides_by_the_scale(scale):
    # A power of two scales exactly, so the rounding points are the same ones. Values under
    # 2^-126 are left out: a CPU flushes them to zero on their way.
    x = boundaries()
    x = x[np.abs(x.astype(np.float64) * scale) >= 2.0**-126]
    got = cast_to_fp8((x.astype(np.float64) * scale).astype(np.float32), jnp.float32(scale))
    np.testing.assert_array_equal(np.asarray(got, np.float64), nearest_even(x))


def test_cast_saturates_and_keeps_nan_and_inf_visible():
    x = jnp.array([448, 463, 464, 465, 480, 1e4, -465, -1e4, 3e38, -3e38], jnp.float32)
    got = np.asarray(cast_to_fp8(x, jnp.float32(1.0)), np.float64)
    np.testing.assert_array_equal(got, np.copysign(448.0, np.asarray(x)))
    bad = jnp.array([np.nan, np.inf, -np.inf], jnp.float32)
    assert np.isnan(np.asarray(cast_to_fp8(bad, jnp.float32(1.0)), np.float32)).all()
    for scale in (np.nan, 0.0):
        assert np.isnan(np.asarray(cast_to_fp8(jnp.zeros(3), jnp.float32(scale)), np.float32)).all()
    # One NaN pattern, whatever the sign of the NaN that came.
    signed = jnp.array([np.nan, -np.nan, np.inf, -np.inf], jnp.float32)
    assert set(bits(cast_to_fp8(signed, jnp.float32(1.0)))) == {0x7F}


def test_zero_keeps_its_sign():
    got = cast_to_fp8(jnp.array([0.0, -0.0], jnp.float32), jnp.float32(1.0))
    assert list(bits(got)) == [0x00, 0x80]


@pytest.mark.parametrize(
    ("axis", "keepdims", "shape"),
    [
        (None, True, ()),
        (None, False, ()),
        (-1, True, (3, 5, 1)),
        (-1, False, (3, 5)),
        ((-2, -1), True, (3, 1, 1)),
        ((-2, -1), False, (3,)),
        (0, True, (1, 5, 7)),
        ((0, 1, 2), True, (1, 1, 1)),
    ],
)
def test_scale_shapes_and_values(axis, keepdims, shape):
    x = np.random.default_rng(0).normal(size=(3, 5, 7)).astype(np.float32)
    qvalue, scale = quantize(x, axis=axis, keepdims=keepdims)
    assert (qvalue.shape, qvalue.dtype) == (x.shape, FP8_DTYPE)
    assert (scale.shape, scale.dtype) == (shape, jnp.float32)
    amax = np.abs(x).max(axis=axis, keepdims=keepdims and axis is not None)
    np.testing.assert_array_equal(np.asarray(scale), amax * INV_FP8_MAX)
    np.testing.assert_allclose(np.asarray(scale), amax.astype(np.float64) / 448, rtol=2**-23)
    # The largest magnitude of every slice lands on 448, the largest e4m3 value.
    top = np.abs(np.asarray(qvalue, np.float32)).max(axis=axis)
    np.testing.assert_array_equal(top, np.full_like(top, 448.0))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("axis", [None, -1, 0])
def test_jit_and_eager_agree_bit_for_bit(dtype, axis):
    x = (jax.random.normal(jax.random.key(3), (64, 129)) * 7).astype(dtype)
    eager = quantize(x, axis=axis)
    jitted = jax.jit(lambda x: quantize(x, axis=axis))(x)
    for a, b in zip(eager, jitted, strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))
    # Every 16-bit float is a float32, so the narrow input quantizes as its widened self.
    wide = quantize(x.astype(jnp.float32), axis=axis)
    for a, b in zip(eager, wide, strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))


def test_float64_computes_in_float32():
    x = np.random.default_rng(1).normal(size=(8, 33))
    with jax.enable_x64(True):
        got = quantize(jnp.asarray(x, jnp.float64), axis=-1)
        beyond = quantize(jnp.array([[1e300, 1.0], [1.0, 2.0]], jnp.float64), axis=-1)
    want = quantize(x.astype(np.float32), axis=-1)
    assert got[1].dtype == jnp.float32
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))
    # A float64 that float32 cannot hold is an infinity there, and says so.
    assert np.isnan(np.asarray(beyond[0], np.float32)[0, 0])
    np.testing.assert_array_equal(np.isfinite(np.asarray(beyond[1])), [[False], [True]])


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_extreme_rows(wrap):
    rows = np.zeros((5, 4), np.float32)
    rows[1] = [5e-37, -5e-37, 1e-38, 0]  # amax / 448 is below 2^-126
    rows[2] = [3e38, -3e38, 1e36, 1]
    rows[3] = [450 * 2.0**-126, 2.0**-126, 0, 0]  # about the smallest amax with a scale of its own
    rows[4] = [1e-30, -2e-30, 3e-30, 0]
    qvalue, scale = wrap(lambda x: quantize(x, axis=-1, keepdims=False))(rows)
    scale = np.asarray(scale)
    np.testing.assert_array_equal(scale[:2], [1.0, 1.0])
    assert (scale >= 2.0**-126).all() and np.isfinite(scale).all()
    assert np.isfinite(np.asarray(qvalue, np.float32)).all()
    np.testing.assert_array_equal(np.asarray(qvalue, np.float32)[:2], np.zeros((2, 4)))
    np.testing.assert_allclose(scale[2:], rows[2:].max(-1).astype(np.float64) / 448, rtol=2**-22)
    deq = np.asarray(qvalue, np.float64) * scale[:, None]
    np.testing.assert_allclose(deq[[2, 4]], rows[[2, 4]], rtol=1 / 17, atol=2**-10 * scale[2])


@pytest.mark.parametrize("poison", [np.nan, -np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("width", [20, 513])  # XLA's float maximum loses the NaN at 513 on a CPU
def test_a_bad_row_is_nan_and_touches_no_other(poison, width):
    x = np.random.default_rng(2).normal(size=(6, width)).astype(np.float32)
    clean = quantize(x, axis=-1)
    x[2, 7] = poison
    qvalue, scale = quantize(x, axis=-1)
    assert np.isnan(np.asarray(qvalue, np.float32)[2, 7])
    assert not np.isfinite(np.asarray(scale)[2]).any()
    # Under an infinite scale the finite entries are 0, and 0·inf is NaN: the whole row is NaN.
    assert np.isnan((qvalue.astype(jnp.float32) * scale)[2]).all()
    others = [0, 1, 3, 4, 5]
    np.testing.assert_array_equal(bits(qvalue)[others], bits(clean[0])[others])
    np.testing.assert_array_equal(bits(scale)[others], bits(clean[1])[others])


def test_empty_rows_and_no_rows():
    qvalue, scale = quantize(jnp.zeros((0, 5)), axis=-1)
    assert qvalue.shape == (0, 5) and scale.shape == (0, 1)
    qvalue, scale = quantize(jnp.zeros((0, 5)))
    assert qvalue.shape == (0, 5) and scale == 1.0


@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.just(4), st.just(8)),  # one shape: no compile for each example
        elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
    ),
    st.sampled_from([None, -1]),
)
def test_round_trip_error(x, axis):
    # e4m3 rounds to within 1/17 of a normal value (half a step of 2^-3, at 1 + 2^-4) and within
    # 2^-10 of a subnormal; forming x/scale and value*scale costs a few roundings of 2^-24.
    qvalue, scale = quantize(x, axis=axis)
    scale = np.asarray(scale, np.float64)
    got = np.asarray(qvalue, np.float64) * scale
    bound = np.maximum(np.abs(x.astype(np.float64)) / 17, 2.0**-10 * scale) * (1 + 2.0**-20)
    assert (np.abs(got - x) <= bound).all()


@pytest.mark.parametrize(
    "x",
    [
        np.ones(4, np.int32),
        np.ones(4, np.int8),
        np.ones(4, bool),
        np.ones(4, np.complex64),
        np.ones(4, ml_dtypes.float8_e4m3fn),
        np.ones(4, ml_dtypes.float8_e5m2),
    ],
    ids=lambda x: str(x.dtype),
)
def test_what_cannot_be_quantized_is_refused(x):
    with pytest.raises(TypeError, match=rf"`x` must be a real float.*but it is {x.dtype}\."):
        quantize(x)


def test_is_fp8_tells_the_one_format():
    assert is_fp8(jnp.float8_e4m3fn) and is_fp8("float8_e4m3fn")
    others = ["float8_e5m2", "float8_e4m3fnuz", "float32", "bfloat16", "int8"]
    assert not any(is_fp8(other) for other in others)
