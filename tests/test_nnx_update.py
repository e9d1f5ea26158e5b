"""Updates and reloads of nnx.State: exact key accounting, the same buffers, no recompilation."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nnx_cases import Net, inputs, served
from test_reload import count_compilations
from update_cases import addresses, assert_same_bits, weight

import jaxfp8._donate
from jaxfp8 import (
    DenseWeight,
    PaddedKernel,
    ReloadError,
    dequantize_params,
    reload_params,
    trainable_mask,
    update_params,
)
from jaxfp8.nnx import WEIGHTS, FP8Param, PaddedFP8Linear, reload_model


def weights(model: nnx.Module) -> nnx.State:
    return nnx.state(model, WEIGHTS)


def strings(tree):
    """A pure dict as a checkpoint gives it back: no Variables, list indices as strings."""
    if not isinstance(tree, dict):
        return np.array(tree)
    return {str(key): strings(value) for key, value in tree.items()}


FORMS = {
    "state": lambda state: state,
    "pure dict": nnx.to_pure_dict,
    "plain dict": lambda state: strings(nnx.to_pure_dict(state)),
    "arrays in a state": lambda state: nnx.State(nnx.to_pure_dict(state)),
}


def reference(trainer: Net) -> nnx.State:
    """What a served Net must hold then: made by hand, kernel by kernel."""
    state = weights(served(5))
    for path, variable in nnx.to_flat_state(weights(trainer)):
        *heads, name = path
        node = state
        for head in heads:
            node = node[head]
        value = variable.get_value()
        node[name].set_value(PaddedKernel.from_dense(value) if name == "kernel" else value)
    return state


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("write", [update_params, reload_params])
def test_takes_every_form_of_a_float_model(form, write):
    trainer, model = Net(seed=1), served()
    template = weights(model)
    structure = jax.tree.structure(template)
    new = write(template, FORMS[form](weights(trainer)))
    assert isinstance(new, nnx.State) and jax.tree.structure(new) == structure
    assert_same_bits(new, reference(trainer))


def test_a_state_into_a_linen_tree_and_back():
    linen = {"kernel": PaddedKernel.from_dense(weight(20, 30)), "bias": jnp.zeros(30)}
    float_state = nnx.state(nnx.Linear(20, 30, rngs=nnx.Rngs(0)))
    layer = PaddedFP8Linear(20, 30, rngs=nnx.Rngs(1))
    tree = update_params(linen, float_state)
    state = update_params(nnx.state(layer), tree)
    assert_same_bits(tree["kernel"], state["kernel"].get_value())
    loaded = {"kernel": DenseWeight(weight(30, 20), "out_in"), "bias": weight(30)}
    state = update_params(state, loaded)
    want = PaddedKernel.from_dense(weight(30, 20).T)
    assert_same_bits(state["kernel"].get_value(), want)


def test_accounts_for_every_path_without_noise():
    loaded = nnx.to_pure_dict(weights(Net(seed=1)))
    del loaded["layers"][0]["up"]["kernel"], loaded["layers"][1]["norm"]
    loaded["head"] = {"kernel": weight(20, 5)}
    loaded["layers"][1]["down"]["kernel"] = weight(20, 30)
    with pytest.raises(ValueError) as caught:
        update_params(weights(served()), loaded)
    text = str(caught.value)
    assert "Missing in `loaded` (3): layers/0/up/kernel, layers/1/norm/bias, layers/1/norm/" in text
    assert "Unexpected in `loaded` (1): head/kernel." in text
    assert "  layers/1/down/kernel: its shape is (20, 30)" in text
    assert "value" not in text.replace("present values", "").replace("DenseWeight(value", "")
    good = nnx.to_pure_dict(weights(Net(seed=1)))
    del good["layers"][0]
    good["head"] = loaded["head"]
    model = served()
    new = update_params(weights(model), good, partial=True, ignore="head")
    kept = weights(model)["layers"][0]["up"]["kernel"].get_raw_value()
    assert new["layers"][0]["up"]["kernel"].get_raw_value().qvalue is kept.qvalue


def test_a_static_scale_is_kept_unless_loaded():
    def layer(seed):
        return PaddedFP8Linear(20, 30, static_x_scale=True, rngs=nnx.Rngs(seed))

    model, trainer = layer(0), nnx.state(nnx.Linear(20, 30, rngs=nnx.Rngs(1)))
    model.x_scale[...] = jnp.float32(0.25)
    new = update_params(nnx.state(model), trainer)
    assert float(new["x_scale"][...]) == 0.25
    loaded = {**nnx.to_pure_dict(trainer), "x_scale": np.float32(0.5)}
    assert float(update_params(nnx.state(model), loaded)["x_scale"][...]) == 0.5
    with pytest.raises(ValueError, match="x_scale: a scale is not positive"):
        update_params(nnx.state(model), {**loaded, "x_scale": np.float32(-1)})
    assert jax.tree.structure(dequantize_params(new)) == jax.tree.structure(trainer)


def test_dequantizes_into_the_state_of_the_float_model():
    model, stock = served(), Net(seed=1)
    floats = dequantize_params(weights(model))
    assert jax.tree.structure(floats) == jax.tree.structure(weights(stock))
    kernel = model.layers[1].down.kernel.get_value()
    assert_same_bits(floats["layers"][1]["down"]["kernel"].get_value(), kernel.dequantize())
    again = dequantize_params(update_params(weights(model), floats))
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(floats), strict=True):
        # The e4m3 values stay; the scale, amax times 1/448, is rounded once more, and its product.
        np.testing.assert_allclose(a, b, rtol=2**-22)
    x = inputs(4, 20)
    nnx.update(stock, floats)
    # Activations are rounded to e4m3 (2^-4), four layers deep, beside a residual.
    far = np.linalg.norm(stock(x) - model(x)) / np.linalg.norm(stock(x))
    assert far < 2**-4


def test_trainable_mask_is_true_for_float_params_only():
    def linear(*sizes, rngs):
        return PaddedFP8Linear(*sizes, static_x_scale=True, rngs=rngs)

    state = nnx.state(Net(linear))
    mask = trainable_mask(state)
    assert jax.tree.structure(mask) == jax.tree.structure(state)
    for path, variable in nnx.to_flat_state(mask):
        wanted = type(variable) is nnx.Param
        assert all(leaf is wanted for leaf in jax.tree.leaves(variable)), path
    assert any(jax.tree.leaves(mask))


def test_reloads_keep_addresses_and_compile_nothing():
    model = served()
    traces = []

    # Without graph_updates=False nnx.jit returns every Variable, and itself moves all buffers.
    @functools.partial(nnx.jit, graph_updates=False)
    def forward(model, x):
        traces.append(1)
        return model(x)

    x = inputs(4, 20)
    trainers = [Net(seed=seed) for seed in (1, 2, 3)]
    want = []
    for trainer in trainers:
        fresh = served(7)
        nnx.update(fresh, update_params(weights(fresh), weights(trainer)))
        want.append(forward(fresh, x))
    reload_model(model, trainers[0])
    forward(model, x)
    del fresh
    before = addresses(weights(model))
    count = len(traces)
    with count_compilations() as compiled:
        for trainer, y in zip([*trainers, trainers[0]], [*want, want[0]], strict=True):
            reload_model(model, trainer)
            got = forward(model, x)
            jax.block_until_ready(got)
            assert addresses(weights(model)) == before
            nnx.update(model, reload_params(weights(model), weights(trainer)))
            assert addresses(weights(model)) == before
            np.testing.assert_array_equal(got, y)
    assert len(traces) == count and not compiled


def test_a_reloaded_module_holds_no_deleted_buffer():
    model, trainer = served(), Net(seed=1)
    old = jax.tree.leaves(nnx.state(model, FP8Param))
    reload_model(model, trainer)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(nnx.state(model)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(nnx.state(trainer)))
    assert all(leaf.is_deleted() for leaf in old)
    assert_same_bits(weights(model), reference(trainer))


def test_a_refused_reload_leaves_the_module_as_it_was():
    model, trainer = served(), Net(seed=1)
    trainer.layers[1].up.kernel[...] = trainer.layers[1].up.kernel[...].at[3, 4].set(jnp.nan)
    before = jax.tree.map(jnp.copy, weights(model))
    with pytest.raises(ValueError, match="layers/1/up/kernel: a weight is NaN"):
        reload_model(model, trainer)
    assert_same_bits(weights(model), before)
    reload_model(model, trainer, allow_nonfinite=True)
    assert np.isnan(np.array(jnp.copy(model.layers[1].up.kernel.get_value().scale))).any()


def test_a_device_error_leaves_new_and_old_leaves_in_the_module(monkeypatch):
    model, trainer = served(), Net(seed=1)
    run, done = jaxfp8._donate.Step.run, []

    def fail(step, leaves, shared, arrived):
        if len(done) == 5:
            raise RuntimeError("out of memory")
        done.extend(step.bundle.names)
        return run(step, leaves, shared, arrived)

    monkeypatch.setattr(jaxfp8._donate.Step, "run", fail)
    with pytest.raises(ReloadError, match="out of memory") as caught:
        reload_model(model, trainer)
    assert list(caught.value.updated) == done and len(done) == 5
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(weights(model)))
    monkeypatch.undo()
    want = dict(nnx.to_flat_state(reference(trainer)))
    for path, variable in nnx.to_flat_state(weights(model)):
        if "/".join(map(str, path)) in done:
            assert_same_bits(variable, want[path])
    reload_model(model, trainer)
    assert_same_bits(weights(model), reference(trainer))


def test_random_streams_are_no_weights():
    with pytest.raises(TypeError, match="drop/rngs/key: typed keys .* are not weights"):
        update_params(nnx.state(served()), nnx.state(Net(seed=1)))


def test_a_variable_of_several_arrays_is_accounted_for_by_array():
    params = {"a": nnx.Param({"w": jnp.zeros(3), "b": jnp.zeros(2)}), "none": nnx.Param(None)}
    state = nnx.State(params)
    new = update_params(state, {"a": {"w": weight(3), "b": weight(2)}})
    np.testing.assert_array_equal(new["a"].get_value()["w"], weight(3))
    with pytest.raises(ValueError, match=r"Missing in `loaded` \(1\): a/b"):
        update_params(state, {"a": {"w": weight(3)}})


def test_hijax_and_ref_variables_are_refused_by_path():
    for options, says in (({"hijax": True}, "HijaxVariable"), ({"ref": True}, "Ref")):
        state = nnx.State({"a": nnx.Param(jnp.zeros(3), **options)})
        with pytest.raises(TypeError, match=f"a: the parameter in `params` is a {says}"):
            update_params(state, {"a": weight(3)})


def test_linen_trees_do_not_load_nnx():
    """Which takes 0.2 s to import, and which Linen itself does without."""
    code = "import sys, jaxfp8; sys.exit('flax.nnx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
