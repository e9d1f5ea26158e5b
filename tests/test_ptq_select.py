"""Which kernels `quantize_dense_params` takes, and how it finds out what they belong to."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze
from ptq_models import KEY, TOKENS, WIDTH, Block, Mlp, Transformer, inputs, scanned

from jaxfp8 import DenseWeight, FP8Weight, PaddedKernel, QuantizedModel, quantize_dense_params


X = inputs(4, WIDTH)
MODEL = Transformer()
ALL = {"mlp/up", "mlp/down", "logits"}


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(KEY, TOKENS)


def call(tree):
    return MODEL.apply(tree, TOKENS)


def chosen(tree):
    """The paths whose kernels are padded, and nothing else is."""
    flat = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: isinstance(node, PaddedKernel)
    )[0]
    paths = {
        jax.tree_util.keystr(keys, simple=True, separator="/")
        for keys, node in flat
        if isinstance(node, PaddedKernel)
    }
    assert all(path.endswith("kernel") for path in paths)
    return {path.removeprefix("params/").removesuffix("kernel").rstrip("/") for path in paths}


@pytest.mark.parametrize(
    ("select", "want"),
    [
        (None, ALL),
        ("*", ALL),
        ("mlp", {"mlp/up", "mlp/down"}),
        ("mlp/*", {"mlp/up", "mlp/down"}),
        ("*/down", {"mlp/down"}),
        (["logits", "*/up"], {"logits", "mlp/up"}),
        (("log*",), {"logits"}),
        (lambda path: path.startswith("mlp"), {"mlp/up", "mlp/down"}),
        (lambda path: path == "logits", {"logits"}),
    ],
)
def test_patterns_and_predicates(params, select, want):
    assert chosen(quantize_dense_params(params, select, apply=call)) == want


@pytest.mark.parametrize("select", ["mlp", ["mlp", "logits"], lambda path: "attention" not in path])
def test_without_a_model_what_is_surely_named(params, select):
    got = quantize_dense_params(params, select)
    assert chosen(got) == chosen(quantize_dense_params(params, select, apply=call))


def test_the_tree_may_be_variables_or_params(params):
    inside = quantize_dense_params(params["params"], "mlp", apply=lambda p: call({"params": p}))
    assert chosen(inside) == {"mlp/up", "mlp/down"}
    # Another collection may hold what looks like a layer: it belongs to no module's parameters.
    tree = {**params, "average": {"logits": {"kernel": jnp.ones((36, 53))}}, "step": jnp.int32(3)}
    for apply in (None, lambda tree: call({"params": tree["params"]})):
        got = quantize_dense_params(tree, "logits", apply=apply)
        assert chosen(got) == {"logits"}
        np.testing.assert_array_equal(got["average"]["logits"]["kernel"], 1.0)
        assert got["step"] == 3 and got["step"].dtype == jnp.int32


def test_containers_are_kept(params):
    frozen = quantize_dense_params(freeze(params), "logits", apply=call)
    assert type(frozen) is type(freeze(params)) and chosen(frozen) == {"logits"}
    x, model = inputs(4, 33), nn.Dense(10)
    one = model.init(KEY, x)["params"]
    got = quantize_dense_params([one, (one, {"head": one})])
    assert chosen(got) == {"0", "1/0", "1/1/head"}


def test_a_tree_of_two_models_of_which_one_is_asked():
    # A kernel is known by the box that it travels in, not by a path that both models have.
    policy, critic = Mlp(), Mlp()
    tree = {
        "policy": policy.init(KEY, X)["params"],
        "critic": critic.init(jax.random.key(1), X)["params"],
    }
    got = quantize_dense_params(tree, apply=lambda t: policy.apply({"params": t["policy"]}, X))
    assert chosen(got) == {"policy/up", "policy/down"}


def test_kernels_of_other_layers_are_not_taken():
    class Zoo(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.DenseGeneral(10, name="general")(x)
            y = nn.DenseGeneral((4, 5), name="heads")(y)
            y = nn.DenseGeneral(12, axis=(-2, -1), name="joined")(y)
            y = nn.Einsum((12, 36), "...a,ab->...b", name="einsum")(y)
            y = nn.Conv(36, (3,), name="conv1")(y[None])
            y = nn.Conv(36, (3, 3), name="conv2")(y[None])[0, 0]
            y = nn.RNN(nn.OptimizedLSTMCell(10, name="cell"), name="rnn")(y[None])[0]
            return nn.Dense(10, name="dense")(y)

    model = Zoo()
    params = jax.tree.map(lambda a: np.ones(a.shape), jax.eval_shape(model.init, KEY, X))
    got = quantize_dense_params(params, apply=lambda tree: model.apply(tree, X))
    assert chosen(got) == {"dense"}
    with pytest.raises(ValueError, match=r"general \(DenseGeneral\)"):
        quantize_dense_params(params, "general", apply=lambda tree: model.apply(tree, X))


@pytest.mark.parametrize("axis", [0, -3])
def test_a_stack_along_the_first_axis_is_one_however_it_is_named(axis):
    class OneLayer(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            return x + nn.Dense(WIDTH, use_bias=False, name="dense")(x), None

    model = scanned(axis=axis, block=OneLayer)
    params = {"params": {"dense": {"kernel": inputs(3, WIDTH, WIDTH)}}}
    got = quantize_dense_params(params, apply=lambda tree: model.apply(tree, X))
    assert got["params"]["dense"]["kernel"].stack == (3,)


@pytest.mark.parametrize("size", [16, 20])
def test_a_stack_along_another_axis_is_refused_even_where_all_sizes_agree(size):
    class Square(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            return nn.Dense(size, use_bias=False, name="dense")(x), None

    model, x = scanned(length=16, axis=1, block=Square), inputs(4, size)
    params = model.init(KEY, x)
    with pytest.raises(ValueError, match="Stack along axis 0"):
        quantize_dense_params(params, apply=lambda tree: model.apply(tree, x))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_axis_of_jax_vmap_is_found_even_where_all_sizes_agree(axis):
    model, x = nn.Dense(16, use_bias=False), inputs(4, 16)
    stacked = {"params": {"kernel": inputs(16, 16, 16)}}

    def mapped(trees):
        return jax.vmap(model.apply, in_axes=({"params": {"kernel": axis}}, None))(trees, x)

    if axis == 0:
        assert quantize_dense_params(stacked, apply=mapped)["params"]["kernel"].stack == (16,)
        return
    with pytest.raises(TypeError, match="whose stack is not along the first axes"):
        quantize_dense_params(stacked, apply=mapped)


def test_boxes_keep_their_names():
    class Named(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
            return nn.Dense(WIDTH, kernel_init=init, name="dense")(x), None

    model = nn.scan(
        Named,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=3,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )()
    params = model.init(KEY, X)
    for per_channel, names in ((True, ("layers", "out")), (False, ("layers",))):
        got = quantize_dense_params(
            params, apply=lambda tree: model.apply(tree, X), per_channel=per_channel
        )
        kernel = got["params"]["dense"]["kernel"]
        assert kernel.qvalue.names == ("layers", "out", "in") and kernel.scale.names == names
        want = PaddedKernel.from_dense(
            params["params"]["dense"]["kernel"].value, per_channel=per_channel
        )
        np.testing.assert_array_equal(kernel.scale.value, want.scale)
        y, _ = QuantizedModel(model).apply(got, X)
        np.testing.assert_array_equal(y, QuantizedModel(model).apply(nn.meta.unbox(got), X)[0])
        again = quantize_dense_params(got, per_channel=per_channel)
        assert again["params"]["dense"]["kernel"].qvalue.names == kernel.qvalue.names


def test_twice_is_once_and_in_parts_is_whole(params):
    whole = quantize_dense_params(params, apply=call)
    again = quantize_dense_params(whole, apply=call)
    parts = quantize_dense_params(quantize_dense_params(params, "mlp"), apply=call)
    for other in (again, parts):
        assert jax.tree.structure(other) == jax.tree.structure(whole)
        jax.tree.map(np.testing.assert_array_equal, other, whole)


def test_numpy_trees_are_taken(params):
    got = quantize_dense_params(jax.tree.map(np.asarray, params), apply=call)
    jax.tree.map(np.testing.assert_array_equal, got, quantize_dense_params(params, apply=call))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(got))


def test_weights_of_checkpoints_are_for_update_params():
    for weight in (DenseWeight(np.ones((3, 4))), FP8Weight(np.ones((3, 4)), np.float32(1))):
        with pytest.raises(TypeError, match="`head/kernel` is a .*load the checkpoint"):
            quantize_dense_params({"head": {"kernel": weight}})


def test_the_block_of_the_models_is_a_block():
    # `apply` may reach a part of the model only: layers elsewhere are not chosen.
    block = Block()
    tree = {"a": block.init(KEY, X)["params"], "b": block.init(KEY, X)["params"]}
    got = quantize_dense_params(tree, "b", apply=lambda t: block.apply({"params": t["b"]}, X))
    assert chosen(got) == {"b/mlp/up", "b/mlp/down"}
    with pytest.raises(ValueError, match=r"a/mlp/up \(`apply` does not read it\)"):
        quantize_dense_params(tree, "a", apply=lambda t: block.apply({"params": t["b"]}, X))
