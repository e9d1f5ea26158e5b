"""Under `jax.transfer_guard("disallow")`: nothing goes between host and device unsaid.

A CPU reports transfers to the device alone; a GPU also those from it, and between devices.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_files import write
from flax import nnx
from update_cases import assert_same_bits, devices, owned, served_tree, trainer_tree, weight

from jaxfp8 import (
    PaddedFP8Dense,
    PaddedKernel,
    calibrate,
    dequantize_params,
    fp8_dense,
    fp8_dense_float,
    quantize_input,
    reload_params,
    reload_stream,
    scaled_matmul,
    trainable_mask,
    update_params,
    update_rows,
    with_x_scales,
)
from jaxfp8.checkpoint import load_safetensors, save_safetensors
from jaxfp8.nnx import PaddedFP8Linear, reload_model


K, N = 40, 52


def guarded(f, *args, **options):
    """Twice, since what is compiled first may send constants along."""
    with jax.transfer_guard("disallow"):
        f(*args, **options)
        return f(*args, **options)


def kernel(seed=0):
    return PaddedKernel.from_dense(weight(K, N, seed=seed))


def on_device(tree, *, committed=False):
    tree = jax.tree.map(jnp.array, tree)
    return owned(tree) if committed else tree


def test_the_guard_is_on():
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        guarded(jax.jit(jnp.sin), np.ones(3, np.float32))


def chain(x, up, down, bias, scale):
    h = fp8_dense(x, up, bias, activation="gelu", x_scale=scale, out_scale=scale)
    return fp8_dense(h, down, out_dtype=x.dtype) + fp8_dense(quantize_input(x), up)[..., :K]


CALLS = {
    "fp8_dense": lambda x, up, down, bias, scale: fp8_dense(x, up, bias, activation="silu"),
    "a chain": chain,
    "of rows alone": lambda x, up, *rest: jax.vmap(fp8_dense, in_axes=(0, None))(x[:, None], up),
    "gradients": lambda x, up, *rest: jax.grad(lambda x: fp8_dense(x, up).sum())(x),
    "scaled_matmul": lambda x, up, down, bias, scale: scaled_matmul(
        up.qvalue, up.qvalue, scale, up.scale
    ),
    "float weights": lambda x, up, *rest: fp8_dense_float(x, up.dequantize(), activation="gelu"),
    "from_dense": lambda x, up, *rest: PaddedKernel.from_dense(up.dequantize()),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_operations_under_jit(call):
    down = PaddedKernel.from_dense(weight(N, K))
    args = jax.device_put((weight(8, K), kernel(), down, weight(N), np.float32(0.02)))
    guarded(jax.jit(call), *args)


def test_layers_are_served():
    layer, x = PaddedFP8Dense(N, activation="gelu"), jax.device_put(weight(8, K))
    params = layer.init(jax.random.key(0), x)
    guarded(jax.jit(layer.apply), params, x)
    model = PaddedFP8Linear(K, N, rngs=nnx.Rngs(0))
    guarded(nnx.jit(lambda model, x: model(x)), model, x)


# How the trainer's tree comes.
FORMS = {
    "on the same device": on_device,
    "on another device": lambda tree: jax.device_put(tree, devices()[2]),
    "on the host": lambda tree: tree,
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@forms
@pytest.mark.parametrize("committed", [True, False])
def test_reload_params(committed, form):
    params, loaded = on_device(served_tree(), committed=committed), form(trainer_tree())
    with jax.transfer_guard("disallow"):
        for _ in range(2):
            params = reload_params(params, loaded)
    assert_same_bits(params, served_tree(1))


@forms
def test_update_params(form):
    params = on_device(served_tree())
    assert_same_bits(guarded(update_params, params, form(trainer_tree())), served_tree(1))


@forms
def test_reload_stream(form):
    params, loaded = on_device({"a": {"kernel": kernel()}}), form({"a": weight(K, 16, seed=3)})
    with jax.transfer_guard("disallow"):
        with reload_stream(params, shards={"a": {"q": 16, "k": 36}}) as stream:
            stream.put("a/kernel", loaded["a"], shard="q")
            params = stream.finish(partial=True)
    whole = np.concatenate([weight(K, 16, seed=3), weight(K, N)[:, 16:]], axis=1)
    assert_same_bits(params["a"]["kernel"], PaddedKernel.from_dense(whole))


@forms
@pytest.mark.parametrize("committed", [True, False])
def test_update_rows(committed, form):
    old = jax.device_put(kernel(), devices()[1]) if committed else kernel()
    new = form({"w": weight(K, 16, seed=3)})["w"]
    got = guarded(update_rows, old, 8, new)
    whole = weight(K, N)
    whole[:, 8:24] = weight(K, 16, seed=3)
    assert_same_bits(jax.device_get(got), jax.device_get(PaddedKernel.from_dense(whole)))


@pytest.mark.parametrize("write_into", [reload_params, update_params])
def test_a_checkpoint(write_into, tmp_path):
    """From a file, with layers stacked and fused when they are read, and into one."""
    tensors = {f"{i}.{name}": weight(26, K, seed=i) for i in range(2) for name in "qk"}
    path = write(tmp_path / "model.safetensors", tensors)
    names = [(r"(\d)\.(\w+)", r"\2/kernel[\1]")]
    w = np.stack(
        [np.concatenate([tensors[f"{i}.q"], tensors[f"{i}.k"]]).swapaxes(0, 1) for i in range(2)]
    )
    fresh = PaddedKernel.from_dense(w)
    params = on_device({"qk": {"kernel": PaddedKernel.from_dense(w + 1)}})
    with jax.transfer_guard("disallow"):
        loaded = load_safetensors(path, names=names, fuse={"qk": ("q", "k")})
        params = write_into(params, loaded)
    assert_same_bits(params["qk"]["kernel"], fresh)
    flat = {"up": {"kernel": kernel()}}
    guarded(save_safetensors, flat, tmp_path / "out.safetensors")


def test_calibrate():
    layer, x = PaddedFP8Dense(N), jax.device_put(weight(8, K))
    params = layer.init(jax.random.key(0), x)
    scales = guarded(calibrate, layer, params, [x], progress=False)
    tree = guarded(with_x_scales, params, scales)
    want = np.abs(weight(8, K)).max() * (np.float32(1) / np.float32(448))
    np.testing.assert_array_equal(tree["params"]["x_scale"], want)


def test_trees_and_nnx():
    params = on_device(served_tree())
    guarded(dequantize_params, params)
    guarded(trainable_mask, params)
    model, trainer = PaddedFP8Linear(K, N, rngs=nnx.Rngs(0)), nnx.Linear(K, N, rngs=nnx.Rngs(1))
    guarded(reload_model, model, trainer)
    want = PaddedKernel.from_dense(trainer.kernel.get_value())
    assert_same_bits(model.kernel.get_value(), want)
