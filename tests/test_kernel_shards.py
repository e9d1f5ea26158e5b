"""KernelShards: a fused parameter from its pieces, in one tree, without a concatenated copy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_stream_shards import SIZES, K, N, pieces, served, whole
from test_update_rows import FORMS
from update_cases import addresses, assert_padding_holds, assert_same_bits, weight

from jaxfp8 import (
    FP8Weight,
    KernelShards,
    PaddedKernel,
    reload_params,
    reload_stream,
    update_params,
)
from jaxfp8._accounting import account
from jaxfp8._bundles import bundles
from jaxfp8._donate import steps


@pytest.mark.parametrize(
    ("form", "stack"), [*((form, ()) for form in FORMS), ("out_in", (3,)), ("numpy", (3,))]
)
def test_kernel_shards_in_a_tree(form, stack):
    parts = pieces(stack)
    loaded = {
        "layer_0": {
            "qkv": {
                "kernel": KernelShards({n: FORMS[form](w) for n, (w, _) in parts.items()}, SIZES),
                "bias": KernelShards({n: b for n, (_, b) in parts.items()}, SIZES),
            }
        }
    }
    params = served(stack)
    where = addresses(params)
    assert_same_bits(update_params(params, loaded), whole(parts))
    params = reload_params(params, loaded)
    assert_same_bits(params, whole(parts))
    with reload_stream(params) as stream:
        stream.put_tree("", loaded)
        params = stream.finish()
    assert addresses(params) == where
    assert_same_bits(params, whole(parts))
    traced = jax.jit(update_params)(params, loaded)
    assert_same_bits(traced, whole(parts))


def test_kernel_shards_of_several_kinds_keep_their_own_scales():
    """A checkpoint's q in float, k and v per tensor, of scales that vLLM would merge."""
    q = weight(K, 21)
    k, v = (jnp.asarray(weight(7, K, seed=s), jnp.float8_e4m3fn) for s in (1, 2))
    shards = {
        "v": FP8Weight(v, np.float32(3e-4), "out_in"),
        "k": FP8Weight(k, np.float32(150.0), "out_in"),
        "q": q,
    }
    kernel = update_params(
        {"a": PaddedKernel.from_dense(weight(K, N, seed=9))}, {"a": KernelShards(shards, SIZES)}
    )["a"]
    np.testing.assert_array_equal(kernel.scale[21:28], np.full(7, 150, np.float32))
    np.testing.assert_array_equal(kernel.scale[28:35], np.full(7, 3e-4, np.float32))
    exact = np.concatenate([k.astype(jnp.float32).T * 150, v.astype(jnp.float32).T * 3e-4], -1)
    np.testing.assert_array_equal(kernel.dequantize()[:, 21:], exact)
    np.testing.assert_array_equal(
        kernel.dequantize()[:, :21], PaddedKernel.from_dense(q).dequantize()
    )
    assert_padding_holds(kernel)


def test_kernel_shards_want_no_copy_of_the_weight():
    sizes = {"q": 1000, "k": 210}
    kernel = PaddedKernel.from_dense(jnp.ones((1000, 1210)))
    shards = KernelShards({n: jnp.ones((1000, size)) for n, size in sizes.items()}, sizes)
    (write,) = account({"a": kernel}, {"a": shards}, partial=False, ignore=())
    (bundle,) = bundles([write])
    carry, _ = bundle.measure(iter(()))
    (step,) = steps(bundle, carry)
    memory = step.program.memory_analysis()
    assert memory.alias_size_in_bytes == kernel.qvalue.nbytes + kernel.scale.nbytes
    assert memory.temp_size_in_bytes <= kernel.qvalue.nbytes + 16 * 1210  # No float copy.


@pytest.mark.parametrize(
    ("shards", "pattern"),
    [
        (KernelShards({"q": weight(K, 21)}, SIZES), r"\['q'\], but its sizes name .*update_rows"),
        (KernelShards({}, {"q": 3}), "together 3, but it has 35"),
        (
            KernelShards({"q": weight(K, 21), "k": weight(K, 8), "v": weight(K, 7)}, SIZES),
            r"shard 'k': its shape is \(24, 8\)",
        ),
    ],
)
def test_kernel_shards_that_do_not_fit(shards, pattern):
    params = {"a": PaddedKernel.from_dense(weight(K, N))}
    for function in (update_params, reload_params):
        with pytest.raises(ValueError, match=f"(?s)nothing has been changed.*a: .*{pattern}"):
            function(params, {"a": shards})
    with pytest.raises(ValueError, match="a scalar and has no rows"):
        update_params({"a": jnp.float32(1)}, {"a": shards})
