"""Padded kernels in a model written without FP8, under the transforms of JAX and Flax."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CLOSE, bits
from ptq_models import KEY, WIDTH, Autoencoder, Block, Mlp, inputs, scanned

from jaxfp8 import (
    PaddedFP8Dense,
    PaddedKernel,
    QuantizedModel,
    fp8_dense,
    quantize_dense_params,
)


X = inputs(4, WIDTH)


def serve(model, x=X):
    """The float tree, the served one, and the model that runs on it."""
    params = jax.jit(model.init)(KEY, x)
    served = quantize_dense_params(params, apply=lambda tree: model.apply(tree, x))
    return params, served, QuantizedModel(model)


def kernels(tree):
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, PaddedKernel))
    return [node for node in nodes if isinstance(node, PaddedKernel)]


@pytest.mark.parametrize("remat", [False, True])
def test_scan(remat):
    block = nn.remat(Block) if remat else Block
    model = scanned(block=block)
    params, served, quantized = serve(model)
    assert [kernel.stack for kernel in kernels(served)] == [(3,), (3,)]
    got, _ = jax.jit(quantized.apply)(served, X)
    # The same program as that of padded layers, and the loop.
    want, _ = jax.jit(scanned(block=block, dense=PaddedFP8Dense).apply)(served, X)
    np.testing.assert_array_equal(bits(got), bits(want))
    x = X
    for index in range(3):
        layer = jax.tree.map(lambda leaf, index=index: leaf[index], params)
        x, _ = QuantizedModel(Block()).apply(quantize_dense_params(layer), x)
    np.testing.assert_allclose(got, x, **CLOSE)


def test_scan_in_scan():
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            return scanned(length=2)(x)[0], None

    _, served, quantized = serve(scanned(length=3, block=Outer))
    assert [kernel.stack for kernel in kernels(served)] == [(3, 2), (3, 2)]
    got, _ = jax.jit(quantized.apply)(served, X)
    x = X
    for i in range(3):
        for j in range(2):
            layer = jax.tree.map(lambda leaf, at=(i, j): leaf[at], served["params"])
            name = next(iter(layer))
            x, _ = QuantizedModel(Block()).apply({"params": layer[name]}, x)
    np.testing.assert_allclose(got, x, **CLOSE)


def test_weights_broadcast_into_a_scan():
    model = nn.RNN(nn.LSTMCell(10))
    x = inputs(2, 5, 33)
    params, served, quantized = serve(model, x)
    assert len(kernels(served)) == 8 and not any(kernel.stack for kernel in kernels(served))
    got, want = jax.jit(quantized.apply)(served, x), model.apply(params, x)
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert 1e-3 < error < 0.1


@pytest.mark.parametrize("in_axis", [0, None], ids=["own inputs", "shared inputs"])
def test_vmap_over_the_layer(in_axis):
    ensemble = nn.vmap(
        nn.Dense,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=in_axis,
        axis_size=5,
    )(10)
    x = inputs(5, 4, 33) if in_axis == 0 else inputs(4, 33)
    _, served, quantized = serve(ensemble, x)
    got = quantized.apply(served, x)
    for i in range(5):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], served["params"])
        want = fp8_dense(x if in_axis is None else x[i], one["kernel"], one["bias"])
        np.testing.assert_allclose(got[i], want, **CLOSE)


def test_vmap_over_inputs_and_over_trees():
    _, served, quantized = serve(Mlp())
    x = inputs(5, 4, WIDTH)
    mapped = jax.vmap(quantized.apply, in_axes=(None, 0))(served, x)
    np.testing.assert_allclose(mapped, quantized.apply(served, x), **CLOSE)
    # A stack of trees, as an ensemble is served by jax.vmap; its axis is told by the sizes.
    model = Mlp()
    stacked = jax.vmap(model.init, in_axes=(0, None))(jax.random.split(KEY, 3), X)
    ensemble = quantize_dense_params(
        stacked, apply=lambda trees: jax.vmap(model.apply, in_axes=(0, None))(trees, X)
    )
    assert [kernel.stack for kernel in kernels(ensemble)] == [(3,), (3,)]
    got = jax.vmap(quantized.apply, in_axes=(0, None))(ensemble, X)
    for index in range(3):
        one = jax.tree.map(lambda leaf, index=index: leaf[index], ensemble)
        np.testing.assert_allclose(got[index], quantized.apply(one, X), **CLOSE)


@pytest.mark.parametrize("remat", [False, True])
def test_gradient_with_respect_to_inputs_and_float_leaves(remat):
    class Model(nn.Module):
        dense: type = nn.Dense

        @nn.compact
        def __call__(self, x):
            dense = nn.remat(self.dense) if remat else self.dense
            return dense(10, name="out")(nn.LayerNorm(name="norm")(x))

    _, served, quantized = serve(Model())
    kernel = served["params"]["out"]["kernel"]
    rest = {"norm": served["params"]["norm"], "bias": served["params"]["out"]["bias"]}

    def loss(x, rest, model):
        tree = {"norm": rest["norm"], "out": {"kernel": kernel, "bias": rest["bias"]}}
        return (model.apply({"params": tree}, x) ** 2).sum()

    got = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)(X, rest, quantized)
    want = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)(X, rest, Model(PaddedFP8Dense))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), got, want)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(got))


def test_kernels_cannot_be_trained_by_accident():
    _, served, quantized = serve(Mlp())
    with pytest.raises(TypeError, match="cannot be differentiated"):
        jax.grad(lambda tree: quantized.apply(tree, X).sum())(served)


def test_methods_other_than_call_and_setup():
    model, x = Autoencoder(), inputs(4, 33)
    params = model.init(KEY, x)
    served = quantize_dense_params(
        params,
        # `apply` may call the model as often, and by whatever method, as it takes.
        apply=lambda p: model.apply(p, model.apply(p, x, method="encode"), method="decode"),
    )
    quantized = QuantizedModel(model)
    z = quantized.apply(served, x, method="encode")
    down, up = served["params"]["down"], served["params"]["up"]
    np.testing.assert_array_equal(z, nn.relu(fp8_dense(x, down["kernel"], down["bias"])))
    want = fp8_dense(z, up["kernel"], up["bias"])
    np.testing.assert_array_equal(quantized.apply(served, z, method=Autoencoder.decode), want)
    np.testing.assert_array_equal(quantized.apply(served, x), want)
    # A layer that `apply` does not reach cannot be chosen, and is left alone.
    half = quantize_dense_params(params, apply=lambda tree: model.apply(tree, x, method="encode"))
    assert isinstance(half["params"]["up"]["kernel"], jax.Array)


@pytest.mark.parametrize("inner", [False, True], ids=["scope of the layer", "scope of the module"])
def test_share_scope(inner):
    class Lora(nn.Module):
        base: nn.Dense | None = None

        def setup(self):
            self.layer = nn.Dense(10) if self.base is None else self.base
            nn.share_scope(self, self.layer)

        @nn.compact
        def __call__(self, x):
            a = self.param("a", nn.initializers.normal(), (x.shape[-1], 2))
            b = self.param("b", nn.initializers.normal(), (2, 10))
            return self.layer(x) + x @ a @ b

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return (Lora(name="lora") if inner else Lora(nn.Dense(10, name="lora")))(x)

    _, served, quantized = serve(Model())
    layer = served["params"]["lora"]
    assert set(layer) == {"a", "b", "kernel", "bias"} and isinstance(layer["kernel"], PaddedKernel)
    want = fp8_dense(X, layer["kernel"], layer["bias"]) + X @ layer["a"] @ layer["b"]
    np.testing.assert_allclose(quantized.apply(served, X), want, rtol=1e-6, atol=1e-6)


def test_subclasses_of_dense():
    class Scaled(nn.Dense):
        def __call__(self, inputs):
            return 2 * super().__call__(inputs)

    class Named(nn.Dense):
        def scores(self, inputs):
            return self(inputs=inputs)

    class Model(nn.Module):
        def setup(self):
            self.scaled, self.named = Scaled(20), Named(10)

        def __call__(self, x):
            return self.named.scores(self.scaled(x))

    _, served, quantized = serve(Model())
    one, two = served["params"]["scaled"], served["params"]["named"]
    h = 2 * fp8_dense(X, one["kernel"], one["bias"])
    want = fp8_dense(h, two["kernel"], two["bias"])
    np.testing.assert_array_equal(quantized.apply(served, X), want)


def test_the_same_layer_called_twice():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(WIDTH)
            return layer(layer(x))

    _, served, quantized = serve(Twice())
    (kernel,) = kernels(served)
    bias = served["params"]["Dense_0"]["bias"]
    want = fp8_dense(fp8_dense(X, kernel, bias), kernel, bias)
    np.testing.assert_array_equal(quantized.apply(served, X), want)


def test_a_layer_applied_to_weights_of_its_own_and_an_embedding_are_left_alone():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(53, WIDTH, name="embed")
            h = nn.Dense(WIDTH, name="hidden")(embed(tokens))
            head = nn.Dense(53, use_bias=False)
            tied = head.clone(parent=None).apply({"params": {"kernel": embed.embedding.T}}, h)
            return tied + embed.attend(h)

    tokens = jnp.arange(5)
    _, served, quantized = serve(Tied(), tokens)
    hidden, table = served["params"]["hidden"], served["params"]["embed"]["embedding"]
    h = fp8_dense(table[tokens], hidden["kernel"], hidden["bias"])
    np.testing.assert_array_equal(quantized.apply(served, tokens), h @ table.T + h @ table.T)
