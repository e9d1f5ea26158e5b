"""Post-training quantization beside `init`, caches of `jit`, meshes and other interceptors."""

from __future__ import annotations

import flax.linen as nn
import jax
import numpy as np
import pytest
from helpers import CLOSE, bits
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from ptq_models import KEY, WIDTH, Mlp, inputs
from update_cases import mesh_devices

from jaxfp8 import (
    PaddedKernel,
    QuantizedModel,
    fp8_dense_interceptor,
    quantize_dense_params,
)


X = inputs(4, WIDTH)


def serve(model, x=X):
    """The float tree, the served one, and the model that runs on it."""
    params = model.init(KEY, x)
    served = quantize_dense_params(params, apply=lambda tree: model.apply(tree, x))
    return params, served, QuantizedModel(model)


def test_init_under_the_interceptor_is_init():
    model = Mlp()
    with nn.intercept_methods(fp8_dense_interceptor()):
        got = model.init(KEY, X)
    jax.tree.map(np.testing.assert_array_equal, got, model.init(KEY, X))


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "nn.jit"])
def test_caches_of_jit_do_not_mix_trees(jit):
    model = Mlp() if jit is jax.jit else nn.jit(Mlp)()
    params = model.init(KEY, X)
    apply = jit(model.apply)
    before = apply(params, X)
    # Asking twice: the second trace must not be answered by the first one's cache.
    for select in ("up", "up", "down"):
        served = quantize_dense_params(params, select, apply=lambda tree: apply(tree, X))
        assert isinstance(served["params"][select]["kernel"], PaddedKernel)
        with nn.intercept_methods(fp8_dense_interceptor()):
            got = apply(served, X)
            np.testing.assert_array_equal(apply(params, X), before)
        np.testing.assert_array_equal(apply(params, X), before)
        assert np.abs(got - before).max() > 1e-3


def test_one_compile_serves_all_trees():
    model, traces = Mlp(), []

    @jax.jit
    def run(params, x):
        traces.append(1)
        return QuantizedModel(model).apply(params, x)

    for seed in range(3):
        run(quantize_dense_params(model.init(jax.random.key(seed), X)), X)
    assert len(traces) == 1


def test_quantizing_under_jit_and_eval_shape():
    model = Mlp()
    params = model.init(KEY, X)

    def quantize(tree):
        return quantize_dense_params(tree, apply=lambda tree: model.apply(tree, X))

    want, got = quantize(params), jax.jit(quantize)(params)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), got, want)
    abstract = jax.eval_shape(quantize, jax.eval_shape(model.init, KEY, X))
    assert jax.tree.structure(abstract) == jax.tree.structure(want)
    assert jax.eval_shape(QuantizedModel(model).apply, abstract, X).shape == X.shape


def test_sharded_inputs_of_a_shard_map():
    mesh, spec, whole = Mesh(np.array(mesh_devices(2)), ("data",)), P("data"), P()
    _, served, quantized = serve(Mlp())
    mapped = jax.shard_map(quantized.apply, mesh=mesh, in_specs=(whole, spec), out_specs=spec)
    got = jax.jit(mapped)(served, X)
    np.testing.assert_allclose(got, quantized.apply(served, X), **CLOSE)


def test_other_interceptors_around_still_see_the_calls():
    seen = []

    def record(next_fun, args, kwargs, context):
        seen.append((context.module.name, context.method_name))
        return next_fun(*args, **kwargs)

    _, served, quantized = serve(Mlp())
    with nn.intercept_methods(record):
        quantized.apply(served, X)
    assert ("up", "__call__") in seen and ("down", "__call__") in seen
