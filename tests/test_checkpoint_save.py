"""What is saved: read back by others, bit for bit by this package, and whole or not at all."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_files import BF16, E4M3, bits, parse, write
from flax import linen as nn
from safetensors import safe_open
from update_cases import addresses, assert_same_bits, served_tree, trainer_tree, weight

from jaxfp8.checkpoint import _write, load_safetensors, save_safetensors
from jaxfp8.linen import PaddedFP8Dense
from jaxfp8.padded import PaddedKernel
from jaxfp8.update import reload_params, update_params


def kernel(k: int, n: int, *, per_channel: bool = True, seed: int = 0) -> PaddedKernel:
    return PaddedKernel.from_dense(jnp.asarray(weight(k, n, seed=seed)), per_channel=per_channel)


def stacked_tree() -> dict:
    kernels = PaddedKernel.from_dense(jnp.asarray(weight(3, 18, 20)))
    up = {"kernel": kernels, "bias": jnp.ones((3, 20)), "x_scale": jnp.arange(1.0, 4)}
    norm = {"scale": jnp.asarray(weight(3, 18)).astype(jnp.bfloat16)}
    out = {"kernel": jnp.asarray(weight(3, 18, 4))}
    return {"h": {"up": up, "norm": norm, "out": out}, "embed": {"embedding": jnp.ones((30, 18))}}


STACK_NAMES = [
    (r"h/(\w+)/kernel\[(\d)\]", r"model.layers.\2.\1_proj.weight"),
    (r"h/(\w+)/bias\[(\d)\]", r"model.layers.\2.\1_proj.bias"),
    (r"h/norm/scale\[(\d)\]", r"model.layers.\1.norm.weight"),
    (r"embed/embedding", "model.embed_tokens.weight"),
]
STACK_NAMES_BACK = [
    (r"model\.layers\.(\d)\.(\w+)_proj\.weight", r"h/\2/kernel[\1]"),
    (r"model\.layers\.(\d)\.(\w+)_proj\.bias", r"h/\2/bias[\1]"),
    (r"model\.layers\.(\d)\.norm\.weight", r"h/norm/scale[\1]"),
    (r"model\.embed_tokens\.weight", "embed/embedding"),
]


def tree_of(kind: str) -> dict:
    if kind == "stacked":
        return stacked_tree()
    if kind == "mixed":
        static = {"kernel": kernel(18, 20, per_channel=False), "x_scale": jnp.float32(0.5)}
        return {"a": static, "b": {"kernel": kernel(20, 5)}, "c": {"kernel": jnp.ones((5, 4))}}
    return served_tree(per_channel=kind == "per channel")


KINDS = ["per channel", "per tensor", "mixed", "stacked"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["model.safetensors", "folder", "shards"])
def test_loaded_again_it_is_the_same_to_the_bit(kind, where, tmp_path):
    tree = tree_of(kind)
    names, back = (STACK_NAMES, STACK_NAMES_BACK) if kind == "stacked" else (None, None)
    size = 100 if where == "shards" else 5_000_000_000
    save_safetensors(tree, tmp_path / where, names=names, max_shard_bytes=size)
    loaded = load_safetensors(tmp_path / where, names=back)
    assert_same_bits(update_params(jax.eval_shape(lambda: tree), loaded), tree)
    other = jax.tree.map(jnp.zeros_like, tree)
    assert_same_bits(reload_params(other, loaded), tree)
    if where != "model.safetensors":
        assert (len(list((tmp_path / where).glob("*.safetensors"))) > 1) == (where == "shards")


def test_the_bytes_are_logical_and_in_torch_orientation(tmp_path):
    # 18 x 20 is padded to 32 x 32 in memory.
    params = {
        "up": {"kernel": kernel(18, 20), "bias": jnp.ones(20)},
        "out": {"kernel": weight(20, 3)},
    }
    save_safetensors(params, tmp_path)
    tensors, metadata = parse(tmp_path / "model.safetensors")
    shapes = {name: (array.dtype, array.shape) for name, array in tensors.items()}
    f32 = np.dtype(np.float32)
    assert shapes == {
        "up.weight": (E4M3, (20, 18)),
        "up.weight_scale": (f32, (20, 1)),
        "up.bias": (f32, (20,)),
        "out.weight": (f32, (3, 20)),
    }
    value = tensors["up.weight"].astype(np.float32) * tensors["up.weight_scale"]
    np.testing.assert_array_equal(value.T, params["up"]["kernel"].dequantize())
    np.testing.assert_array_equal(tensors["out.weight"].T, params["out"]["kernel"])
    assert metadata["format"] == "pt"


def test_safetensors_reads_it(tmp_path):
    # Its numpy reader lacks F8_E4M3; header and other tensors it reads.
    params = served_tree()
    save_safetensors(params, tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="np") as opened:
        assert set(opened.keys()) == {
            *(f"Dense_{i}.{n}" for i in (0, 1) for n in ("weight", "weight_scale", "bias")),
            "LayerNorm_0.scale",
            "LayerNorm_0.bias",
        }
        assert opened.get_slice("Dense_0.weight").get_dtype() == "F8_E4M3"
        assert opened.get_slice("Dense_0.weight").get_shape() == [100, 64]
        np.testing.assert_array_equal(opened.get_tensor("Dense_0.bias"), params["Dense_0"]["bias"])


def test_the_config_is_what_vllm_takes(tmp_path):
    def config(name: str) -> dict:
        save_safetensors(tree_of(name), tmp_path / name, names=None)
        return json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]

    assert config("per tensor") == {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "ignored_layers": [],
    }
    channel = config("per channel")
    assert (channel["quant_method"], channel["format"]) == ("compressed-tensors", "float-quantized")
    (group,) = channel["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert (group["weights"]["strategy"], group["input_activations"]["dynamic"]) == (
        "channel",
        True,
    )
    mixed = config("mixed")
    assert mixed["ignore"] == ["c"]
    found = {
        (*group["targets"], group["weights"]["strategy"], group["input_activations"]["dynamic"])
        for group in mixed["config_groups"].values()
    }
    assert found == {("a", "tensor", False), ("b", "channel", True)}


def test_other_keys_of_config_json_are_kept(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 18, "compression_config": {"a": 1}}')
    save_safetensors(tree_of("per tensor"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["hidden_size"] == 18 and config.keys() == {"hidden_size", "quantization_config"}
    save_safetensors(trainer_tree(), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {"hidden_size": 18}
    _, metadata = parse(tmp_path / "model.safetensors")
    assert metadata == {"format": "pt"}


def test_shards_have_an_index(tmp_path):
    save_safetensors(served_tree(), tmp_path, max_shard_bytes=2000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [f.name for f in files] == [
        f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)
    ]
    found = {file.name: parse(file)[0] for file in files}
    for file, tensors in found.items():
        assert len(tensors) == 1 or sum(array.nbytes for array in tensors.values()) <= 2000
        assert all(index["weight_map"][name] == file for name in tensors)
    total = sum(array.nbytes for tensors in found.values() for array in tensors.values())
    assert index["metadata"]["total_size"] == total


@pytest.mark.parametrize("fails", [1, 2, 3])
def test_a_failure_leaves_what_was_there(fails, tmp_path, monkeypatch):
    save_safetensors(tree_of("mixed"), tmp_path, max_shard_bytes=100)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    written = 0
    real = _write._write

    def failing(*arguments):
        nonlocal written
        written += 1
        if written == fails:
            arguments[0].write_bytes(b"half")
            raise OSError("no space left on device")
        real(*arguments)

    monkeypatch.setattr(_write, "_write", failing)
    other = jax.tree.map(lambda a: a + a, tree_of("mixed"))
    with pytest.raises(OSError, match="no space"):
        save_safetensors(other, tmp_path, max_shard_bytes=100)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_tree_can_be_saved_over_the_file_that_it_was_loaded_from(tmp_path):
    # The old file stays mapped until the tree is gone.
    file = write(tmp_path / "model.safetensors", {"up.weight": weight(20, 18)})
    loaded = load_safetensors(file)
    params = update_params({"up": {"kernel": kernel(18, 20, seed=9)}}, loaded)
    save_safetensors(params, file)
    assert bits(loaded["up"]["kernel"].value) == bits(weight(20, 18))
    assert_same_bits(update_params(params, load_safetensors(file)), params)


def test_saving_moves_no_buffer_in_the_next_reload(tmp_path):
    params = jax.block_until_ready(served_tree())
    before = addresses(params)
    save_safetensors(params, tmp_path)
    assert addresses(reload_params(params, trainer_tree())) == before


def test_boxed_trees_and_layers_as_flax_makes_them(tmp_path):
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    layer = PaddedFP8Dense(20, kernel_init=init, static_x_scale=True)
    params = layer.init(jax.random.key(0), jnp.ones((2, 18), jnp.bfloat16))["params"]
    save_safetensors(params, tmp_path / "layer.safetensors")
    tensors, _ = parse(tmp_path / "layer.safetensors")
    assert tensors.keys() == {"weight", "weight_scale", "input_scale", "bias"}
    loaded = load_safetensors(tmp_path / "layer.safetensors")
    assert_same_bits(update_params(jax.tree.map(jnp.zeros_like, params), loaded), params)


def test_a_tied_parameter_may_have_several_names_and_others_none(tmp_path):
    params = {"embedding": jnp.ones((30, 18), BF16), "step": jnp.int32(3)}
    names = [("embedding", ["embed.weight", "lm_head.weight"]), ("step", None)]
    save_safetensors(params, tmp_path / "model.safetensors", names=names)
    assert parse(tmp_path / "model.safetensors")[0].keys() == {"embed.weight", "lm_head.weight"}


def test_without_the_library_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'jaxfp8\[checkpoint\]'"):
        save_safetensors(served_tree(), tmp_path)
    assert not list(Path(tmp_path).iterdir())
