"""Elements of a stack in a stream: layer by layer, and by shards of a layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_reload import identity_of
from test_update_rows import FORMS
from update_cases import addresses, assert_same_bits, mesh_devices, weight

import jaxfp8._donate
from jaxfp8 import (
    PaddedKernel,
    ReloadError,
    reload_params,
    reload_stream,
    update_params,
)
from jaxfp8._accounting import split_path


K, N, LAYERS = 24, 35, 4
SIZES = {"q": 21, "k": 7, "v": 7}


def served(stack=(LAYERS,), *, per_channel: bool = True):
    kernel = PaddedKernel.from_dense(weight(*stack, K, N, seed=90), per_channel=per_channel)
    return {
        "layers": {
            "dense": {
                "kernel": kernel,
                "bias": jnp.array(weight(*stack, N, seed=91)),
                "x_scale": jnp.full(stack, 0.5, jnp.float32),
            },
            "norm": {"scale": jnp.array(weight(*stack, K, seed=92))},
        },
        "head": jnp.zeros((3, 5)),
    }


def layer(seed: int):
    return {
        "dense": {
            "kernel": weight(K, N, seed=seed),
            "bias": weight(N, seed=seed),
            "x_scale": np.float32(seed + 1),
        },
        "norm": {"scale": weight(K, seed=seed)},
    }


def stacked(layers):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *layers)


def test_layer_by_layer_in_any_order():
    params = served()
    where, what = addresses(params), identity_of(params)
    layers = [layer(i) for i in range(LAYERS)]
    seen: list[tuple[int, int]] = []
    with reload_stream(params, progress=lambda *told: seen.append(told)) as stream:
        for i in (2, 0, 3, 1):
            stream.put_tree(f"layers[{i}]", layers[i])
        stream.put("head", weight(3, 5))
        updated = stream.finish()
    expected = update_params(served(), {"layers": stacked(layers), "head": weight(3, 5)})
    assert_same_bits(updated, expected)
    assert addresses(updated) == where and identity_of(updated) == what
    assert seen[-1][0] == seen[-1][1] == sum(leaf.nbytes for leaf in jax.tree.leaves(updated))


@pytest.mark.parametrize(
    ("form", "per_channel"),
    [*((form, True) for form in FORMS), ("numpy", False), ("out_in", False)],
)
def test_one_element_leaves_the_others_as_they_were(form, per_channel):
    params = served(per_channel=per_channel)
    new = weight(K, N, seed=5)
    expected = jax.tree.map(np.array, params["layers"]["dense"]["kernel"])
    alone = update_params(
        {"kernel": PaddedKernel.from_dense(np.zeros((K, N)), per_channel=per_channel)},
        {"kernel": FORMS[form](new)},
    )["kernel"]
    expected.qvalue[1], expected.scale[1] = alone.qvalue, alone.scale
    with reload_stream(params) as stream:
        stream.put("layers/dense/kernel[1]", FORMS[form](new))
        assert stream.updated == ("layers/dense/kernel[1]",)
        assert [m for m in stream.missing if "kernel" in m] == [
            f"layers/dense/kernel[{i}]" for i in (0, 2, 3)
        ]
        updated = stream.finish(partial=True)
    assert_same_bits(updated["layers"]["dense"]["kernel"], expected)


def test_two_axes_and_part_of_them():
    params = served((2, 3))
    kernels = weight(2, 3, K, N, seed=7)
    biases = weight(2, 3, N, seed=8)
    with reload_stream(params) as stream:
        for i, j in np.ndindex(2, 3):
            stream.put(f"layers/dense/kernel[{i}][{j}]", kernels[i, j])
        for i in range(2):
            stream.put(f"layers/dense/bias[{i}]", jnp.array(biases[i]))
        assert stream.updated[-2:] == ("layers/dense/kernel", "layers/dense/bias")
        updated = stream.finish(partial=True)["layers"]["dense"]
    assert_same_bits(updated["kernel"], PaddedKernel.from_dense(kernels))
    np.testing.assert_array_equal(updated["bias"], biases)


def test_shards_of_elements():
    params, kernels = served(), weight(LAYERS, K, N, seed=3)
    where = addresses(params)
    with reload_stream(params, shards={"*/dense": SIZES}) as stream:
        for i in range(LAYERS):
            at = 0
            for name, rows in SIZES.items():
                path = f"layers/dense/kernel[{i}]"
                stream.put(path, kernels[i, :, at : at + rows], shard=name)
                at += rows
                if (i, name) == (1, "q"):
                    assert stream.updated[-1] == f"{path}[q]"
                    assert [m for m in stream.missing if "kernel" in m] == [
                        f"{path}[k]",
                        f"{path}[v]",
                        "layers/dense/kernel[2]",
                        "layers/dense/kernel[3]",
                    ]
        assert stream.updated == ("layers/dense/kernel",)
        stream.put("layers/dense/bias[2]", weight(21, seed=1), shard="q")
        updated = stream.finish(partial=True)
    assert_same_bits(updated["layers"]["dense"]["kernel"], PaddedKernel.from_dense(kernels))
    expected = weight(LAYERS, N, seed=91)
    expected[2, :21] = weight(21, seed=1)
    np.testing.assert_array_equal(jnp.copy(updated["layers"]["dense"]["bias"]), expected)
    assert addresses(updated) == where


def test_all_elements_share_a_program_which_wants_the_memory_of_one():
    layers, k, n = 16, 512, 768
    params = {"w": PaddedKernel.from_dense(jnp.zeros((layers, k, n)))}
    jaxfp8._donate._compile.cache_clear()
    compiled, original = [], jaxfp8._donate._compile

    def keep(*args):
        compiled.append(original(*args))
        return compiled[-1]

    with pytest.MonkeyPatch.context() as patch, reload_stream(params) as stream:
        patch.setattr(jaxfp8._donate, "_compile", keep)
        for i in range(layers):
            stream.put(f"w[{i}]", weight(k, n, seed=i))
        stream.finish()
    assert original.cache_info().misses == 1
    memory = compiled[0].memory_analysis()
    assert memory.alias_size_in_bytes >= layers * k * n
    assert memory.temp_size_in_bytes <= 4 * k * n * 2  # Of one element, in float32, twice.


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("layers/dense/kernel[4]", r"\[4\] is past the end.*stack of \(4,\)"),
        ("layers/dense/kernel[0][1]", r"\[0\]\[1\] names an element.*stack of \(4,\) kernels"),
        ("head[0][0][0]", r"of shape \(3, 5\)"),
        ("layers/dense/kernl[1]", "no such leaf. Did you mean 'layers/dense/kernel'"),
        ("layers/dense/kernel[-1]", "no such leaf"),
        ("layers/dense/kernel[1", "no such leaf"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(path, message):
    params = served()
    with reload_stream(params) as stream:
        with pytest.raises(ValueError, match=message):
            stream.put(path, weight(K, N))
        assert stream.updated == ()
        assert stream.finish(partial=True)["head"] is params["head"]


def test_no_index_into_a_kernel_that_is_no_stack():
    with reload_stream({"w": PaddedKernel.from_dense(weight(K, N))}) as stream:
        with pytest.raises(ValueError, match="is one kernel and no stack"):
            stream.put("w[0]", weight(K, N))
        stream.finish(partial=True)


def test_each_element_is_taken_once():
    with reload_stream(served(), shards={"*/dense": SIZES}) as stream:
        stream.put("layers/dense/kernel[1]", weight(K, N))
        stream.put("layers/dense/kernel[2]", weight(K, 7), shard="k")
        for path, shard, columns, message in (
            ("layers/dense/kernel[1]", None, N, "already written"),
            ("layers/dense/kernel", None, N, r"begun with layers/dense/kernel\[1\]"),
            ("layers/dense/kernel", "q", 21, r"begun with layers/dense/kernel\[1\]"),
            ("layers/dense/kernel[1]", "q", 21, "with all its shards at once"),
            ("layers/dense/kernel[2]", None, N, "its shards k were already written"),
            ("layers/dense/kernel[2]", "k", 7, "already written"),
        ):
            with pytest.raises(ValueError, match=message):
                stack = (LAYERS,) if "[" not in path else ()
                stream.put(path, weight(*stack, K, columns), shard=shard)
        stream.put("layers/dense/kernel[2]", weight(K, 21), shard="q")
        stream.finish(partial=True)


def test_a_whole_layer_is_checked_before_any_of_it_is_written():
    broken = layer(1)
    broken["norm"]["scale"][3] = np.inf
    params = served()
    before = jax.tree.map(np.array, params)
    with reload_stream(params) as stream:
        with pytest.raises(ValueError, match=r"norm/scale\[1\]: a weight is NaN"):
            stream.put_tree("layers[1]", broken)
        assert_same_bits(stream.finish(partial=True), before)


def test_a_stream_left_between_layers_names_the_elements():
    with pytest.raises(ReloadError) as caught:
        with reload_stream(served()) as stream:
            stream.put("layers/norm/scale[2]", weight(K))
    assert caught.value.updated == ("layers/norm/scale[2]",)
    assert "layers/norm/scale[0], layers/norm/scale[1], layers/norm/scale[3]" in str(caught.value)


def test_a_key_with_brackets_is_a_key():
    params = {"a[1]": jnp.zeros(3), "b[0]": {"c": jnp.zeros((2, 3))}}
    with reload_stream(params) as stream:
        stream.put("a[1]", np.ones(3, np.float32))
        stream.put_tree("b[0]", {"c": np.ones((2, 3), np.float32)})
        updated = stream.finish()
    assert all(np.all(np.asarray(leaf) == 1) for leaf in jax.tree.leaves(updated))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [(None, "x"), ("x",), (None, None, "x")])
def test_over_several_devices(kind, spec):
    mesh = jax.make_mesh((2,), ("x",), devices=mesh_devices(2), axis_types=(kind,))
    kernels = weight(LAYERS, 32, 48, seed=4)
    whole = PaddedKernel.from_dense(jnp.zeros((LAYERS, 32, 48)))
    axes = PartitionSpec(*spec)
    params = {
        "w": PaddedKernel(
            jax.device_put(whole.qvalue, NamedSharding(mesh, axes)),
            jax.device_put(whole.scale, NamedSharding(mesh, PartitionSpec(*spec[:2]))),
            32,
            48,
        )
    }
    where, what = addresses(params), identity_of(params)
    with reload_stream(params) as stream:
        for i in range(LAYERS):
            stream.put(f"w[{i}]", kernels[i] if i % 2 else jnp.array(kernels[i]))
        updated = stream.finish()
    assert_same_bits(updated["w"], PaddedKernel.from_dense(kernels))
    assert addresses(updated) == where and identity_of(updated) == what
    updated = reload_params(updated, {"w": kernels[::-1]})
    assert_same_bits(updated["w"], PaddedKernel.from_dense(kernels[::-1]))
    assert addresses(updated) == where and identity_of(updated) == what


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a/b", ("a/b", ())),
        ("a/b[3]", ("a/b", (3,))),
        ("a[1]/b[3][12]", ("a[1]/b", (3, 12))),
        ("[0]", ("", (0,))),
        ("", ("", ())),
        ("a[-1]", ("a[-1]", ())),
        ("a[x]", ("a[x]", ())),
    ],
)
def test_paths_and_indices(path, expected):
    assert split_path(path) == expected
