"""The kernels that write a loaded weight: bit for bit what XLA makes of it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from update_cases import addresses, assert_same_bits

import jaxfp8._donate
from jaxfp8 import (
    DenseWeight,
    PaddedKernel,
    ReloadError,
    _cutlass,
    _weights,
    reload_params,
    reload_stream,
    update_params,
)
from jaxfp8._accounting import account
from jaxfp8._bundles import ByKernel, bundles
from jaxfp8._donate import _compile, steps
from jaxfp8._weights import MAX_WEIGHTS


pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _targets():
    assert _cutlass.problem() is None


# [K, N]: aligned; N and K past multiples of 16 by 12, 8, 4, 2 and 1 elements, which take each way
# of loading; one tile and less; longer than a row's block reads at once; many clusters.
SHAPES = [
    (64, 64),
    (3420, 1280),
    (1280, 3420),
    (129, 257),
    (1, 1),
    (16, 16),
    (5000, 72),
    (40, 30522),
]
SHAPES += [(1368, 1028), (62, 130)]
DTYPES = [jnp.bfloat16, jnp.float16, jnp.float32]


def weight(shape, dtype, seed=0):
    w = jax.random.normal(jax.random.key(seed), shape, jnp.float32)
    # Channels of very different sizes, one of zeros, one whose scale would be below 2^-126.
    factor = jnp.exp2(jnp.arange(shape[-1], dtype=jnp.float32) % 13 - 6)
    if shape[-1] > 3:
        factor = factor.at[1].set(0).at[2].set(1e-38)
    return (w * factor).astype(dtype)


def loaded_as(w, layout):
    return jnp.swapaxes(w, -1, -2) if layout == "out_in" else w


@pytest.mark.parametrize("layout", ["in_out", "out_in"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stack", [(), (3,), (2, 2)])
def test_a_weight_is_written_as_from_dense_makes_it(shape, dtype, layout, stack):
    w = weight((*stack, *shape), dtype)
    expected = PaddedKernel.from_dense(w)
    given = loaded_as(w, layout)
    scale = jax.jit(_weights.weight_scale, static_argnames="layout")([given], layout=layout)
    np.testing.assert_array_equal(scale[0], expected.scale[..., : shape[-1]])
    pad = jax.jit(_weights.pad_weight, static_argnames="layout")
    for scales in ([scale], []):  # given, and measured in the same pass
        (arrays,) = pad([given], *scales, layout=layout)
        kernel = PaddedKernel(*arrays, *shape)
        assert_same_bits(kernel, expected)


@pytest.mark.parametrize("layout", ["in_out", "out_in"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_channel_that_is_not_finite_spoils_no_other(layout, dtype, bad):
    w = weight((150, 100), dtype).at[149, 7].set(bad).at[0, 99].set(bad)
    expected = PaddedKernel.from_dense(w)
    pad = jax.jit(_weights.pad_weight, static_argnames="layout")
    (arrays,) = pad([loaded_as(w, layout)], layout=layout)
    kernel = PaddedKernel(*arrays, 150, 100)
    assert_same_bits(kernel, expected)


def test_a_given_scale_is_used_as_it_is():
    w = weight((100, 60), jnp.bfloat16)
    scale = jnp.linspace(0.001, 0.1, 60, dtype=jnp.float32)  # many values saturate
    pad = jax.jit(_weights.pad_weight, static_argnames="layout")
    ((q, s),) = pad([w], scale, layout="in_out")
    expected = jnp.clip(w.astype(jnp.float32) / scale, -448, 448)
    ours = np.asarray(q[:60, :100].astype(jnp.float32)).T
    # e4m3 rounds by 2^-4 of a value, or by half its least step 2^-9.
    bound = np.maximum(np.abs(expected) * 2.0**-4, 2.0**-10)
    assert np.all(np.abs(ours - expected) <= bound * (1 + 1e-6))
    np.testing.assert_array_equal(s[:60], scale)
    np.testing.assert_array_equal(s[60:], 1)


def tree(count, seed, layout="in_out", shape=(96, 200)):
    return {
        f"layer_{i}": {
            "kernel": DenseWeight(loaded_as(weight(shape, jnp.bfloat16, seed + i), layout), layout),
            "bias": jnp.full((shape[1],), seed + i, jnp.float32),
        }
        for i in range(count)
    }


def served(count, shape=(96, 200)):
    make = jax.jit(PaddedKernel.from_dense)
    return {
        f"layer_{i}": {"kernel": make(jnp.ones(shape)), "bias": jnp.zeros((shape[1],)) + i}
        for i in range(count)
    }


@pytest.mark.parametrize("layout", ["in_out", "out_in"])
@pytest.mark.parametrize("allow_nonfinite", [False, True])
def test_a_reload_of_many_layers_alike(layout, allow_nonfinite):
    """More than one program takes; in place, the same bits as one by one."""
    params = served(MAX_WEIGHTS + 5)
    before = addresses(params)
    for seed in (0, 100):
        loaded = tree(MAX_WEIGHTS + 5, seed, layout)
        expected = update_params(params, loaded)
        params = reload_params(params, loaded, allow_nonfinite=allow_nonfinite)
        assert_same_bits(params, expected)
        assert addresses(params) == before


@pytest.mark.usefixtures("no_plans")
def test_layers_alike_are_one_program():
    params, loaded = served(MAX_WEIGHTS + 5), tree(MAX_WEIGHTS + 5, 0)
    writes = account(params, loaded, partial=False, ignore=())
    assert [len(b.names) for b in bundles(writes)] == [
        MAX_WEIGHTS,
        5,
        MAX_WEIGHTS,
        5,
    ]
    _compile.cache_clear()
    params = reload_params(params, loaded)
    assert _compile.cache_info().misses == 4
    reload_params(params, tree(MAX_WEIGHTS + 5, 9))
    assert _compile.cache_info().misses == 4


@pytest.mark.parametrize("layout", ["in_out", "out_in"])
def test_what_is_not_finite_is_named_and_nothing_changes(layout):
    params, loaded = served(4), tree(4, 0, layout)
    bad = loaded["layer_2"]["kernel"].value.at[5, 5].set(jnp.nan)
    loaded["layer_2"]["kernel"] = DenseWeight(bad, layout)
    before = jax.tree.map(np.array, params)
    with pytest.raises(ValueError, match="layer_2/kernel: a weight is NaN") as caught:
        reload_params(params, loaded)
    assert "layer_1" not in str(caught.value) and "layer_3" not in str(caught.value)
    assert_same_bits(params, before)
    params = reload_params(params, loaded, allow_nonfinite=True)
    assert_same_bits(params["layer_1"], update_params(served(4), tree(4, 0, layout))["layer_1"])


@pytest.mark.usefixtures("no_plans")
def test_a_device_error_names_all_of_a_program(monkeypatch):
    def broken(*key):
        def run(*arguments):
            raise RuntimeError("RESOURCE_EXHAUSTED")

        return run

    monkeypatch.setattr(jaxfp8._donate, "_compile", broken)
    with pytest.raises(ReloadError) as caught:
        reload_params(served(3), tree(3, 0))
    # Biases come first in each layer.
    assert caught.value.failed == ("layer_0/bias", "layer_1/bias", "layer_2/bias")


@pytest.mark.parametrize("layout", ["in_out", "out_in"])
def test_a_write_wants_no_memory_of_the_size_of_the_weight(layout):
    params, loaded = served(2, (1000, 512)), tree(2, 0, layout, (1000, 512))
    writes = account(params, loaded, partial=False, ignore=())
    (kernels,) = [b for b in bundles(writes) if isinstance(b.method, ByKernel)]
    carry, _ = kernels.measure(iter(()))
    (step,) = steps(kernels, carry)
    program: Any = step.program
    memory = program.memory_analysis()
    kernel = params["layer_0"]["kernel"]
    assert memory.alias_size_in_bytes == 2 * (kernel.qvalue.nbytes + kernel.scale.nbytes)
    assert memory.temp_size_in_bytes <= 4096
    assert " copy(" not in program.as_text()


@pytest.mark.parametrize("layout", ["in_out", "out_in"])
@pytest.mark.parametrize("where", [jnp.asarray, np.asarray])
@pytest.mark.parametrize("allow_nonfinite", [False, True])
def test_elements_of_a_stack_are_written_by_the_kernels(layout, where, allow_nonfinite):
    """In a stream from either side, and in a reload of a stack of the host."""
    shape, layers = (1028, 1368), 5
    w = [weight(shape, jnp.bfloat16, seed=i) for i in range(layers)]
    params = {"w": jax.vmap(PaddedKernel.from_dense)(jnp.zeros((layers, *shape), jnp.bfloat16))}
    before = addresses(params)

    def given(value):
        return DenseWeight(where(loaded_as(value, layout)), layout)

    with reload_stream(params, allow_nonfinite=allow_nonfinite) as stream:
        for i in reversed(range(layers)):
            stream.put(f"w[{i}]", given(w[i]))
        params = stream.finish()
    expected = update_params(params, {"w": jnp.stack(w)})
    assert_same_bits(params, expected)
    assert addresses(params) == before
    turned = jnp.stack(w[::-1])
    expected = update_params(params, {"w": turned})
    params = reload_params(params, {"w": given(turned)}, allow_nonfinite=allow_nonfinite)
    assert_same_bits(params, expected)
    assert addresses(params) == before
