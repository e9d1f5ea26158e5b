"""A trainer's later trees go into what `quantize_dense_params` made."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ptq_models import KEY, TOKENS, WIDTH, Transformer, inputs, scanned
from update_cases import addresses, assert_same_bits, host_bits, mesh_devices, owned

from jaxfp8 import (
    QuantizedModel,
    dequantize_params,
    quantize_dense_params,
    reload_params,
    trainable_mask,
)
from jaxfp8.update import update_params


MODELS = {"transformer": (Transformer(), TOKENS), "scan": (scanned(), inputs(4, WIDTH))}
models = pytest.mark.parametrize("name", MODELS)


def trees(name, count=2):
    """So many trees of a trainer, and a function that quantizes one."""
    model, x = MODELS[name]
    floats = [jax.jit(model.init)(jax.random.key(seed), x) for seed in range(count)]

    def quantize(tree, **kwargs):
        return quantize_dense_params(tree, apply=lambda tree: model.apply(tree, x), **kwargs)

    return floats, quantize


@models
def test_update_is_quantizing_anew(name):
    (first, second), quantize = trees(name)
    got = update_params(quantize(first), second)
    assert_same_bits(got, quantize(second))
    assert_same_bits(update_params(got, second), got)


@models
def test_reload_is_in_place_and_nothing_recompiles(name):
    floats, quantize = trees(name, 3)
    model, x = MODELS[name]
    serve, served = jax.jit(QuantizedModel(model).apply), owned(quantize(floats[0]))
    want = [np.asarray(serve(owned(quantize(tree)), x)[0]) for tree in floats]
    before = addresses(served)
    for index in (1, 2, 0):
        served = reload_params(served, floats[index])
        np.testing.assert_array_equal(serve(served, x)[0], want[index])
        assert addresses(served) == before
    assert serve._cache_size() == 1


def test_the_result_shares_no_buffer_with_the_trainers_tree():
    (first, second), quantize = trees("transformer")
    before = host_bits(first)
    served = quantize(first)
    assert not set(addresses(served)) & set(addresses(first))
    reload_params(served, second)  # donates all of `served`
    for bits, old in zip(host_bits(first), before, strict=True):
        np.testing.assert_array_equal(bits, old)


def test_an_abstract_template_is_filled():
    (first, _), quantize = trees("scan")
    abstract = jax.eval_shape(quantize, jax.eval_shape(lambda: first))
    assert_same_bits(update_params(abstract, first), quantize(first))


def test_the_other_tools_for_served_trees():
    (first, _), quantize = trees("transformer")
    served = quantize(first)
    floats = dequantize_params(served)
    assert jax.tree.structure(floats) == jax.tree.structure(first)
    # Quantizing what was dequantized gives the same codes: amax is where it was.
    np.testing.assert_array_equal(
        np.asarray(quantize(floats)["params"]["logits"]["kernel"].qvalue),
        np.asarray(served["params"]["logits"]["kernel"].qvalue),
    )
    mask = trainable_mask(served)["params"]
    assert not mask["logits"]["kernel"].qvalue and mask["logits"]["bias"]
    restored = serialization.from_bytes(quantize(first), serialization.to_bytes(served))
    assert_same_bits(restored, served)


def test_sharded_leaves_stay_where_they_are():
    mesh = Mesh(np.array(mesh_devices(4)), ("model",))
    model, x = nn.Sequential([nn.Dense(32), nn.LayerNorm(), nn.Dense(10)]), inputs(4, 48)
    params = model.init(KEY, x)
    rows, whole = NamedSharding(mesh, P("model")), NamedSharding(mesh, P())
    placed = jax.tree.map(lambda a: jax.device_put(a, whole if a.size == 10 else rows), params)
    got = quantize_dense_params(placed, apply=lambda tree: model.apply(tree, x))
    want = quantize_dense_params(params, apply=lambda tree: model.apply(tree, x))
    assert_same_bits(got, want)
    assert got["params"]["layers_1"]["scale"].sharding == rows
    assert got["params"]["layers_2"]["bias"].sharding == whole
    assert got["params"]["layers_0"]["kernel"].qvalue.sharding.device_set == rows.device_set


def test_half_precision_trees():
    model, x = nn.Dense(10), inputs(4, 33, dtype=jnp.bfloat16)
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), model.init(KEY, x))
    served = quantize_dense_params(params)
    later = jax.tree.map(lambda a: (a * 2).astype(jnp.float32), params)
    updated = update_params(served, later)
    assert updated["params"]["bias"].dtype == jnp.bfloat16
    assert_same_bits(updated["params"]["kernel"].qvalue, served["params"]["kernel"].qvalue)
