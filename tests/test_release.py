"""What was given is let go when its last reference goes, not when Python's collector comes by.

A cycle of a few Python objects may hold a whole checkpoint, on the host or on the device, and in a
loop that makes few objects the collector comes late.
"""

import gc
import time
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nnx_cases import Net, inputs
from nnx_cases import served as served_net
from update_cases import served_tree, trainer_tree, weight

from jaxfp8 import (
    DenseWeight,
    FP8Weight,
    KernelShards,
    PaddedFP8Dense,
    PaddedKernel,
    ReloadError,
    calibrate,
    dequantize_params,
    quantize,
    quantize_dense_params,
    reload_params,
    reload_stream,
    update_params,
    update_rows,
)
from jaxfp8.checkpoint import load_safetensors, save_safetensors
from jaxfp8.nnx import calibrate as nnx_calibrate
from jaxfp8.nnx import quantize_linears, reload_model, set_x_scales


def arrays(tree):
    return [weakref.ref(leaf) for leaf in jax.tree.leaves(tree)]


def kept_by(work, make) -> list:
    """What of `make()`'s trees is alive after `work` of them, once nothing here holds it.

    The first turn compiles, which may leave cycles of JAX's own, without the arrays or with them.
    """
    for _ in range(2):
        gc.collect()
        gc.disable()
        try:
            given = make()
            held = arrays(given)
            work(*given)
            del given
            alive = still_alive(held)
        finally:
            gc.enable()
    return [(type(array).__name__, array.shape) for array in alive]


def still_alive(held):
    """What is not let go within seconds: programs that run read it, and XLA drops it when called.

    (Its threads put references to numpy arrays on a list, which the next transfer empties.)
    """
    deadline = time.monotonic() + 5
    while alive := [array for ref in held if has_memory(array := ref())]:
        if time.monotonic() > deadline:
            break
        del alive
        time.sleep(1e-3)
        jax.device_put(np.zeros(()))
    return alive


def has_memory(array):
    return array is not None and not (isinstance(array, jax.Array) and array.is_deleted())


def on_device(tree):
    return jax.tree.map(jnp.array, tree)


def fp8(w):
    return FP8Weight(*quantize(jnp.asarray(w).T, axis=-1, keepdims=False), "out_in")


def in_fp8():
    tree = trainer_tree()
    for name in ("Dense_0", "Dense_1"):
        tree[name]["kernel"] = fp8(tree[name]["kernel"])
    return tree


def in_shards():
    tree = trainer_tree()
    kernel = tree["Dense_0"]["kernel"]
    shards = {"q": DenseWeight(kernel[:, :60]), "k": DenseWeight(kernel[:, 60:])}
    tree["Dense_0"]["kernel"] = KernelShards(shards, {"q": 60, "k": 40})
    return tree


def streamed(params, loaded):
    with reload_stream(params) as stream:
        stream.put_tree("Dense_0", loaded["Dense_0"])
        for name, leaf in loaded.get("Dense_1", {}).items():
            stream.put(f"Dense_1/{name}", leaf)
        stream.put_tree("", {key: loaded[key] for key in loaded if "Dense" not in key})
        return stream.finish()


LOADED = {
    "host": trainer_tree,
    "device": lambda: on_device(trainer_tree()),
    "fp8": in_fp8,
    "shards": in_shards,
}


@pytest.mark.parametrize("work", [update_params, reload_params, streamed])
@pytest.mark.parametrize("loaded", LOADED.values(), ids=LOADED)
def test_trees_of_an_update(work, loaded):
    assert kept_by(work, lambda: (served_tree(), loaded())) == []


def stacks():
    params = {"layers": PaddedKernel.from_dense(jnp.zeros((3, 20, 30)))}
    return params, {"layers": weight(3, 20, 30)}


def elements_streamed(params, loaded):
    with reload_stream(params) as stream:
        for i, layer in enumerate(loaded["layers"]):
            stream.put(f"layers[{i}]", layer)
        stream.finish()


@pytest.mark.parametrize("work", [update_params, reload_params, elements_streamed])
def test_trees_of_a_stack(work):
    assert kept_by(work, stacks) == []


def test_rows():
    def rows():
        return PaddedKernel.from_dense(jnp.zeros((20, 30))), weight(20, 10)

    assert kept_by(lambda kernel, w: update_rows(kernel, 10, w), rows) == []


def test_dequantized_params():
    assert kept_by(dequantize_params, lambda: (served_tree(),)) == []


def test_params_that_are_quantized():
    def params():
        return (on_device(nn.Dense(20).init(jax.random.key(0), np.zeros((1, 10)))),)

    assert kept_by(lambda tree: quantize_dense_params(tree, lambda *_: True), params) == []


def test_a_layer_and_its_calibration():
    layer = PaddedFP8Dense(20)

    def given():
        x = jnp.asarray(weight(3, 10))
        return layer.init(jax.random.key(0), x), x

    def work(params, x):
        layer.apply(params, x)
        calibrate(layer, params, [x], progress=False)

    assert kept_by(work, given) == []


def weights_of(model):
    """Copies, because Flax's nnx.state leaves cycles."""
    return jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize("loaded", [Net, lambda: weights_of(Net())], ids=["module", "tree"])
def test_nnx_models(loaded):
    def work(loaded):
        reload_model(served_net(), loaded, partial=True)

    assert kept_by(work, lambda: (loaded(),)) == []


def test_an_nnx_model_that_is_quantized():
    assert kept_by(lambda model: quantize_linears(model, ...), lambda: (Net(),)) == []


def test_an_nnx_model_that_is_calibrated():
    def work(model):
        set_x_scales(model, nnx_calibrate(model, [inputs(3, 20)], progress=False))

    assert kept_by(work, lambda: (served_net(),)) == []


def test_a_checkpoint(tmp_path):
    save_safetensors(served_tree(), tmp_path)
    assert kept_by(reload_params, lambda: (served_tree(), load_safetensors(tmp_path))) == []


REFUSED = {
    "shape": lambda tree: tree | {"Dense_0": tree["Dense_0"] | {"bias": np.zeros(7, np.float32)}},
    "missing": lambda tree: {"Dense_0": tree["Dense_0"]},
    "unexpected": lambda tree: tree | {"more": np.zeros(7, np.float32)},
    "nan": lambda tree: tree | {"Dense_0": tree["Dense_0"] | {"bias": np.full(100, np.nan)}},
}


@pytest.mark.parametrize("work", [update_params, reload_params, streamed])
@pytest.mark.parametrize("spoil", REFUSED.values(), ids=REFUSED)
def test_trees_of_an_update_that_is_refused(work, spoil):
    def refused(params, loaded):
        try:
            work(params, loaded)
        except (ValueError, ReloadError):
            return
        raise AssertionError("nothing was raised")

    assert kept_by(refused, lambda: (served_tree(), spoil(trainer_tree()))) == []
