"""From names of tensors to paths: pairs, functions, stacks, several paths, nothing unaccounted."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_files import BF16, bits, codes, scalar, write
from update_cases import assert_same_bits, weight

from jaxfp8.checkpoint import load_safetensors
from jaxfp8.checkpoint._names import Target, parse_target
from jaxfp8.padded import DenseWeight, FP8Weight, PaddedKernel
from jaxfp8.update import reload_params, update_params


@pytest.fixture
def file(tmp_path):
    tensors = {
        "model.embed_tokens.weight": weight(30, 18).astype(BF16),
        "model.norm.weight": weight(18),
        "model.layers.0.mlp.up_proj.weight": weight(20, 18),
        "model.layers.0.mlp.up_proj.bias": weight(20),
        "model.rotary.inv_freq": weight(4),
    }
    return write(tmp_path / "model.safetensors", tensors), tensors


PAIRS = [
    (r"model\.embed_tokens\.weight", ["embed/embedding", "lm_head/kernel"]),
    (r"model\.norm\.weight", "norm/scale"),
    (r"model\.layers\.(\d+)\.mlp\.(\w+)_proj\.weight", r"layers_\1/\2/kernel"),
    (r"model\.layers\.(\d+)\.mlp\.(\w+)_proj\.bias", r"layers_\1/\2/bias"),
    (r".*\.inv_freq", None),
    (r".*", "never"),
]


def as_function(name: str):
    last = name.split(".")[-1]
    if "embed" in name:
        return ("embed/embedding", "lm_head/kernel")
    if "norm" in name:
        return "norm/scale"
    if last == "inv_freq":
        return ()
    return f"layers_0/up/{'kernel' if last == 'weight' else last}"


@pytest.mark.parametrize("names", [PAIRS, iter(PAIRS), as_function], ids=["list", "iter", "def"])
def test_pairs_and_functions(names, file):
    path, tensors = file
    loaded = load_safetensors(path, names=names)
    assert loaded.keys() == {"embed", "lm_head", "norm", "layers_0"}
    # The embedding is [vocabulary, width] in Flax too; as a dense layer it is a weight.
    embedding = tensors["model.embed_tokens.weight"]
    assert bits(loaded["embed"]["embedding"]) == bits(embedding)
    tied = loaded["lm_head"]["kernel"]
    assert isinstance(tied, DenseWeight) and bits(tied.value) == bits(embedding)
    assert loaded["layers_0"]["up"].keys() == {"kernel", "bias"}
    assert bits(loaded["norm"]["scale"]) == bits(tensors["model.norm.weight"])


def test_every_unmatched_name_is_listed(file):
    path, tensors = file
    with pytest.raises(ValueError) as caught:
        load_safetensors(path, names=PAIRS[2:4])
    for name in tensors:
        assert (name in str(caught.value)) == ("up_proj" not in name)
    with pytest.raises(ValueError, match=r"no path for 5 tensors"):
        load_safetensors(path, names=lambda name: None)


def test_a_pattern_is_for_the_whole_name(file):
    path, tensors = file
    with pytest.raises(ValueError, match="no path for 5 tensors"):
        load_safetensors(path, names=[("model", "a"), ("weight", "b"), (r"norm\.weight", "c")])


def test_ignored_tensors_need_no_path(file):
    path, _ = file
    loaded = load_safetensors(path, names=PAIRS[:4], ignore="*.inv_freq")
    assert loaded.keys() == {"embed", "lm_head", "norm", "layers_0"}
    with pytest.raises(ValueError, match="inv_freq"):
        load_safetensors(path, names=PAIRS[:4], ignore=("inv_freq",))


def test_by_default_weights_are_kernels(file):
    path, _ = file
    loaded = load_safetensors(path, ignore="*norm*")
    assert loaded["model"]["layers"]["0"]["mlp"]["up_proj"].keys() == {"kernel", "bias"}
    assert loaded["model"]["rotary"].keys() == {"inv_freq"}


def test_a_layer_at_the_root(tmp_path):
    tensors = {"weight": codes(20, 18), "weight_scale": scalar(0.5), "bias": weight(20)}
    loaded = load_safetensors(write(tmp_path / "model.safetensors", tensors))
    assert loaded.keys() == {"kernel", "bias"} and isinstance(loaded["kernel"], FP8Weight)


def test_a_stack_is_filled_layer_by_layer(tmp_path):
    # In any order of the files, and with a bias and a norm beside.
    order = (2, 0, 1)
    layers = {i: (weight(20, 18, seed=i), weight(20, seed=i), weight(18, seed=i)) for i in order}
    tensors = {}
    for i, (w, bias, norm) in layers.items():
        tensors |= {f"h.{i}.up.weight": w, f"h.{i}.up.bias": bias, f"h.{i}.norm.weight": norm}
    names = [
        (r"h\.(\d)\.norm\.weight", r"h/norm/scale[\1]"),
        (r"h\.(\d)\.up\.weight", r"h/up/kernel[\1]"),
        (r"h\.(\d)\.up\.bias", r"h/up/bias[\1]"),
    ]
    loaded = load_safetensors(write(tmp_path / "model.safetensors", tensors), names=names)
    params = {
        "up": {
            "kernel": PaddedKernel.from_dense(jnp.zeros((3, 18, 20))),
            "bias": jnp.zeros((3, 20)),
        },
        "norm": {"scale": jnp.zeros((3, 18))},
    }
    for change in (update_params, reload_params):
        got = change({"h": params}, loaded)["h"]
        stacked = [np.stack([layers[i][part] for i in range(3)]) for part in range(3)]
        wanted = PaddedKernel.from_dense(jnp.asarray(stacked[0].swapaxes(-1, -2)))
        assert_same_bits(got["up"]["kernel"], wanted)
        np.testing.assert_array_equal(got["up"]["bias"], stacked[1])
        np.testing.assert_array_equal(got["norm"]["scale"], stacked[2])


def test_a_stack_of_stacks_with_scales_of_both_kinds(tmp_path):
    # Experts within layers; a per-tensor scale beside per-channel ones becomes per-channel.
    tensors, scales = {}, np.empty((2, 3, 20), np.float32)
    for i, j in np.ndindex(2, 3):
        scale = scalar(0.5 + i) if (i, j) == (1, 2) else np.linspace(0.1, 1 + j, 20, dtype="f4")
        tensors[f"h.{i}.e.{j}.weight"] = codes(20, 18, seed=3 * i + j)
        tensors[f"h.{i}.e.{j}.weight_scale"] = scale
        tensors[f"h.{i}.e.{j}.input_scale"] = scalar(1 + 3 * i + j)
        scales[i, j] = scale
    names = [(r"h\.(\d)\.e\.(\d)\.weight", r"h/e/kernel[\1][\2]")]
    loaded = load_safetensors(write(tmp_path / "model.safetensors", tensors), names=names)
    np.testing.assert_array_equal(loaded["h"]["e"]["x_scale"], [[1, 2, 3], [4, 5, 6]])
    np.testing.assert_array_equal(loaded["h"]["e"]["kernel"].scale, scales)
    zeros = PaddedKernel.from_dense(jnp.zeros((2, 3, 18, 20)))
    params = {"h": {"e": {"kernel": zeros, "x_scale": jnp.ones((2, 3))}}}
    got = update_params(params, loaded)["h"]["e"]["kernel"]
    for i, j in np.ndindex(2, 3):
        assert bits(got.qvalue[i, j, :20, :18]) == bits(tensors[f"h.{i}.e.{j}.weight"])


@pytest.mark.parametrize(
    "path",
    ["", "up//kernel", "/up", "[3]", "up[1]/kernel", "up/kernel[x]", "up/kernel[-1]", "up[1"],
)
def test_a_path_that_is_none_is_refused(path):
    with pytest.raises(ValueError, match=r"keys joined by '/', with the element"):
        parse_target(path)


def test_a_path_with_an_index():
    assert parse_target("layers/up/kernel[3][12]") == Target(("layers", "up", "kernel"), (3, 12))
    assert str(parse_target("layers/up/kernel[3][12]")) == "layers/up/kernel[3][12]"
