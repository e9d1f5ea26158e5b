"""The quantize kernel gives the bits that `jaxfp8.quantize` gives, on the GPU and on a CPU."""

import functools

import direct_calls
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import bits

from jaxfp8 import PaddedKernel, quantize_input
from jaxfp8.padded import padded_size
from jaxfp8.quantize import FP8_DTYPE, cast_to_fp8, quantize


pytestmark = pytest.mark.gpu
# Rows are read by 16, 8, 4 or 2 bytes, the most that divide K in bytes: there are some of each.
# 1022 and 2044 fill their last warp.
WIDTHS = [1, 2, 15, 16, 17, 50, 96, 100, 513, 516, 1022, 1026, 1030, 2044, 3420, 3421, 3422, 4096]
WIDTHS += [14336, 16386, 16387, 32768]
WIDTHS += [53252, 57344, 65536]  # read twice in float32
WIDTHS += [65552, 65554, 65556, 70000, 70001]  # read twice
dtypes = pytest.mark.parametrize(
    "dtype", [jnp.bfloat16, jnp.float16, jnp.float32], ids=lambda d: d.__name__
)
NORMAL = np.float32(2.0**-126)
# The first amax whose scale is no longer taken as 1, and its neighbours.
THRESHOLD = np.float32(448 * 2.0**-126)


def rows_of_every_kind(k: int, dtype) -> jnp.ndarray:
    """About a hundred rows: special values at both ends of a row, and all magnitudes."""
    rng = np.random.default_rng(k)
    normal = rng.standard_normal((64, k), np.float32)
    # Each row a magnitude of its own, so that all kinds of scales occur; then within a row.
    top = 120 if jnp.finfo(dtype).bits == 32 or dtype == jnp.bfloat16 else 14
    by_row = np.ldexp(normal, rng.integers(-top, top, (64, 1)))
    by_element = np.ldexp(normal[:16], rng.integers(-top // 8, top // 8, (16, k)))
    edges = [0.0, 5e-37, THRESHOLD, 3e38, np.inf, -np.inf, np.nan]
    edges += [np.nextafter(THRESHOLD, np.float32(s)) for s in (0, 1)]
    special = np.zeros((2 * len(edges) + 3, k), np.float32)
    for i, edge in enumerate(edges):
        special[2 * i, 0] = edge
        special[2 * i + 1] = normal[i] * 1e-3
        special[2 * i + 1, -1] = -edge
    special[-3] = -0.0
    special[-2] = np.where(np.arange(k) % 2, np.nan, np.inf)
    special[-1] = normal[0] * NORMAL * 1e5
    x = np.concatenate([special, by_row, by_element])
    # A CPU flushes subnormal numbers to zero on their way, a GPU does not: none are among these.
    x = np.where(np.abs(x) < NORMAL, np.copysign(np.float32(0), x), x)
    if dtype == jnp.float16:
        x = np.where(np.isfinite(x), np.clip(x, -65504, 65504), x)
    return jnp.asarray(x.astype(dtype))


def by_the_kernel(x, x_scale=None):
    """The call by itself; the scratch of the dense call, before a weight of zeros, is the same."""
    k = x.shape[1]
    weight = PaddedKernel(jnp.zeros((16, padded_size(k)), FP8_DTYPE), jnp.float32(1), k, 16)
    _, *scratch = direct_calls.dense(x, weight, x_scale=x_scale)
    qx, scale = map(np.asarray, direct_calls.quantize(x, x_scale))
    np.testing.assert_array_equal(bits(qx), bits(scratch[0]))
    np.testing.assert_array_equal(bits(scale[:, 0]), bits(scratch[1]))
    return qx, scale[:, 0]


per_token = jax.jit(lambda x: quantize(x, axis=-1, keepdims=False))
by_static_scale = jax.jit(cast_to_fp8)


def on(device, f, *args):
    return f(*(jax.device_put(a, device) for a in args))


def check_bits(got, want, x):
    wrong = (bits(got) != bits(want)).any(-1)
    amax = np.abs(np.asarray(x, np.float32)).max(-1)[wrong]
    assert not wrong.any(), f"{wrong.sum()} of {len(wrong)} rows differ; their amax: {amax[:5]}"


@dtypes
@pytest.mark.parametrize("k", WIDTHS)
def test_per_token(k, dtype):
    x = rows_of_every_kind(k, dtype)
    qx, scale = by_the_kernel(x)
    assert qx.shape == (len(x), padded_size(k))
    padding = bits(qx)[:, k:]
    assert (padding == 0).all()
    for device in (jax.devices("cuda")[0], jax.devices("cpu")[0]):
        want, want_scale = on(device, per_token, x)
        # NaN scales as such: their payload is nobody's business.
        np.testing.assert_array_equal(scale, np.asarray(want_scale))
        check_bits(qx[:, :k], want, x)


@dtypes
@pytest.mark.parametrize("k", [1, 17, 50, 100, 513, 516, 1030, 3420, 4096, 70000])
def test_static_scale(k, dtype):
    x = rows_of_every_kind(k, dtype)
    for x_scale in (1.0, 0.0123, 2.0**-30, 2.0**100, np.inf, np.nan):
        x_scale = np.float32(x_scale)
        qx, scale = by_the_kernel(x, x_scale)
        np.testing.assert_array_equal(scale, np.full(len(x), x_scale))
        assert (bits(qx)[:, k:] == 0).all() or np.isnan(x_scale)
        for device in (jax.devices("cuda")[0], jax.devices("cpu")[0]):
            check_bits(qx[:, :k], on(device, by_static_scale, x, x_scale), x)


def test_many_scales():
    """65536 rows, whose scales take as many mantissas: a reciprocal that is off shows."""
    rng = np.random.default_rng(0)
    x = np.ldexp(
        rng.uniform(0.5, 1, (65536, 64)).astype(np.float32), rng.integers(-60, 60, (65536, 1))
    )
    x = jnp.asarray(x)
    qx, scale = by_the_kernel(x)
    for device in (jax.devices("cuda")[0], jax.devices("cpu")[0]):
        want, want_scale = on(device, per_token, x)
        np.testing.assert_array_equal(bits(scale), bits(want_scale))
        check_bits(qx, want, x)


@pytest.mark.parametrize("m", [1, 2, 7, 8, 9, 255, 257])
def test_rows_that_do_not_fill_a_block(m):
    """Several rows share a block where K is small; the last block is not full."""
    x = jax.random.normal(jax.random.key(m), (m, 40))
    qx, scale = by_the_kernel(x)
    want, want_scale = on(jax.devices("cpu")[0], per_token, x)
    check_bits(qx[:, :40], want, x)
    np.testing.assert_array_equal(bits(scale), bits(want_scale))
    assert (bits(qx)[:, 40:] == 0).all()


# With those above each number of chunks that a thread may have, by each number of bytes.
MANY = [50, 100, 513, 516, 766, 767, 768, 1022, 1030, 1280, 1532, 1534, 1536, 1710, 1711, 1712]
MANY += [2044, 3420, 3421, 3422, 4096, 4098, 4099, 4100, 11004, 11006, 11008, 14336]
MANY += [16386, 16387, 16388, 28668, 28670, 28671, 41000, 41001, 41002, 41004]


@dtypes
@pytest.mark.parametrize(
    ("m", "k"), [*((515, k) for k in MANY), (514, 516), (514, 3420), (2050, 3420), (2051, 1280)]
)
def test_many_rows(m, k, dtype):
    """From 512 rows on a thread keeps more of a row; x grows along it, so a wrong place shows."""
    x = np.random.default_rng(k).standard_normal((m, k), np.float32)
    x = jnp.asarray((x * np.arange(1, k + 1) / k).astype(dtype))
    for x_scale in (None, np.float32(0.003)):
        qx, scale = by_the_kernel(x, x_scale)
        assert (bits(qx)[:, k:] == 0).all()
        for device in (jax.devices("cuda")[0], jax.devices("cpu")[0]):
            if x_scale is None:
                want, want_scale = on(device, per_token, x)
                np.testing.assert_array_equal(bits(scale), bits(want_scale))
            else:
                want = on(device, by_static_scale, x, x_scale)
            check_bits(qx[:, :k], want, x)


@dtypes
@pytest.mark.parametrize("k", [33, 3420])
def test_quantize_input_is_the_call(k, dtype):
    x = rows_of_every_kind(k, dtype)
    for x_scale in (None, np.float32(0.01)):
        qx = quantize_input(x, x_scale=x_scale, implementation="cutlass")
        want, want_scale = by_the_kernel(x, x_scale)
        np.testing.assert_array_equal(bits(qx.qvalue), bits(want))
        if x_scale is None:
            np.testing.assert_array_equal(bits(qx.scale)[:, 0], bits(want_scale))
        else:
            assert qx.scale.shape == () and qx.scale == x_scale


@dtypes
def test_the_eager_and_the_jitted_quantize_agree_on_the_gpu(dtype):
    x = rows_of_every_kind(513, dtype)
    for a, b in zip(
        functools.partial(quantize, axis=-1, keepdims=False)(x), per_token(x), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
