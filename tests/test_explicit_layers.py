"""Layers, trees and models on a mesh of Explicit axes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from explicit_cases import MESH, K, assert_typed, compiled, on_mesh, rows
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from update_cases import weight

from jaxfp8 import (
    PaddedFP8Dense,
    PaddedKernel,
    QuantizedModel,
    calibrate,
    dequantize_params,
    quantize_dense_params,
    update_params,
)
from jaxfp8.nnx import PaddedFP8Linear


N = 52
X = rows(8) / 448
named = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
named_bias = nn.with_partitioning(nn.initializers.normal(), ("model",))
# The product is exact to the bit; the CPU's gelu may differ with how many numbers it is given.
ROUNDING = dict(rtol=1e-5, atol=1e-5)


def placed(tree):
    """A tree of nn.Partitioned boxes on the mesh by their names, and what has none on all of it."""
    specs = nn.get_partition_spec(tree)
    return jax.device_put(tree, jax.tree.map(functools.partial(NamedSharding, MESH), specs))


def served():
    layer = PaddedFP8Dense(N, kernel_init=named, bias_init=named_bias, activation="relu")
    return layer, layer.init(jax.random.key(0), X)


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_a_served_layer_by_the_names_of_its_parameters(wrap):
    layer, params = served()
    with jax.set_mesh(MESH):
        y = wrap(layer.apply)(placed(params), on_mesh(X, "data"))
    assert jax.typeof(y).sharding.spec == P("data", "model")
    np.testing.assert_allclose(y, layer.apply(params, X), **ROUNDING)


def test_a_tree_is_updated_and_dequantized_where_it_lies():
    _, params = served()
    params = placed(params)
    loaded = {"kernel": weight(K, N, seed=5), "bias": weight(N, seed=5)}
    on = {"kernel": on_mesh(loaded["kernel"], None, "model"), "bias": loaded["bias"]}
    with jax.set_mesh(MESH):
        for update, new in ((update_params, loaded), (jax.jit(update_params), on)):
            tree = update(params, {"params": new})["params"]
            kernel = jax.tree.map(lambda box: box.value, tree["kernel"], is_leaf=is_box)
            fresh = PaddedKernel.from_dense(loaded["kernel"])
            assert_typed(kernel, fresh, P("model"), P("model"))
            back = nn.unbox(dequantize_params(tree))
            assert_typed(back["kernel"], fresh.dequantize(), P(None, "model"))


def is_box(node):
    return isinstance(node, nn.Partitioned)


def test_a_trainer_learns_as_on_one_device():
    """Data and tensor parallel, by optax; gradients lie like the parameters."""
    layer = PaddedFP8Dense(N, kernel_init=named, activation="silu", param_dtype=jnp.float32)
    params = layer.init(jax.random.key(0), X)
    optimizer, target = optax.sgd(3.0), np.sin(np.arange(8 * N, dtype=np.float32)).reshape(8, N)

    def step(params, state, x, target):
        loss = lambda p: jnp.mean((layer.apply(p, x) - target) ** 2)  # noqa: E731
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    def losses(params, x, target):
        state, values, run = optimizer.init(params), [], jax.jit(step)
        for _ in range(5):
            params, state, value = run(params, state, x, target)
            values.append(float(value))
        return params, values

    _, want = losses(params, X, target)
    with jax.set_mesh(MESH):
        after, got = losses(placed(params), on_mesh(X, "data"), on_mesh(target, "data", "model"))
    assert nn.unbox(after)["params"]["kernel"].sharding.spec == P(None, "model")
    assert want[-1] < 0.95 * want[0]
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_scanned_layers():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            step = lambda layer, x, _: (layer(x), None)  # noqa: E731
            scan = nn.scan(step, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            return scan(PaddedFP8Dense(K, activation="relu"), x, None)[0]

    net = Net()
    params = net.init(jax.random.key(0), X)
    on = jax.device_put(params, NamedSharding(MESH, P()))
    y = compiled(net.apply)(on, on_mesh(X, "data"))
    assert jax.typeof(y).sharding.spec == P("data", None)
    np.testing.assert_allclose(y, net.apply(params, X), **ROUNDING)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float8_e4m3fn])
def test_nnx(dtype):
    def layer(init):
        return PaddedFP8Linear(
            K, N, kernel_init=init, activation="relu", param_dtype=dtype, rngs=nnx.Rngs(0)
        )

    plain = nnx.initializers.lecun_normal()
    want = layer(plain)(X)
    with jax.set_mesh(MESH):
        model = layer(nnx.with_partitioning(plain, (None, "model")))
        x = on_mesh(X, "data")
        y = nnx.jit(lambda model, x: model(x))(model, x)
        if dtype == jnp.float32:
            grads = nnx.jit(nnx.grad(lambda model, x: jnp.sum(model(x) ** 2)))(model, x)
            assert grads["kernel"].get_value().sharding.spec == P(None, "model")
    assert jax.typeof(y).sharding.spec == P("data", "model")
    np.testing.assert_allclose(y, want, **ROUNDING)


def test_a_model_quantized_after_training():
    model = nn.Sequential([nn.Dense(N), nn.relu, nn.Dense(16)])
    params = model.init(jax.random.key(0), X)
    want = QuantizedModel(model).apply(
        quantize_dense_params(params, apply=lambda p: model.apply(p, X)), X
    )
    with jax.set_mesh(MESH):
        params = jax.device_put(params, NamedSharding(MESH, P()))
        x = on_mesh(X, "data")
        tree = quantize_dense_params(params, apply=lambda p: model.apply(p, x))
        y = jax.jit(QuantizedModel(model).apply)(tree, x)
    assert jax.typeof(y).sharding.spec == P("data", None)
    np.testing.assert_allclose(y, want, **ROUNDING)


def test_calibrate_sees_all_rows():
    """The largest |x| may be on any device."""
    layer = PaddedFP8Dense(N)
    x = X.copy()
    x[6, 3] = -7.0
    params = layer.init(jax.random.key(0), X)
    with jax.set_mesh(MESH):
        on = jax.device_put(params, NamedSharding(MESH, P()))
        scales = calibrate(layer, on, [on_mesh(x, "data")], progress=False)
    np.testing.assert_array_equal(scales["params"]["x_scale"], np.float32(7) / np.float32(448))
