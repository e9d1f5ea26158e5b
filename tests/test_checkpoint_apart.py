"""Fused layers saved as the shards that they were loaded from: no value is rounded again."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_files import BF16, E4M3, bits, codes, fp8, parse, scalar, write
from update_cases import assert_same_bits, weight

from jaxfp8.checkpoint import load_safetensors, save_safetensors
from jaxfp8.padded import PaddedKernel
from jaxfp8.update import update_params


K = 18
SHARDS = {"q": 20, "k": 10, "v": 7}  # None a multiple of 16.
N = sum(SHARDS.values())
FUSE, SPLIT = {"qkv": tuple(SHARDS)}, {"qkv": SHARDS}
SCALES = {
    "q": scalar(0.01),
    "k": np.linspace(1, 9, SHARDS["k"], dtype="f4")[:, None],
    "v": scalar(200),
}


def source(prefix: str = "attn.", seed: int = 0) -> dict[str, np.ndarray]:
    tensors = {}
    for i, (name, n) in enumerate(SHARDS.items(), 3 * seed):
        tensors[f"{prefix}{name}.weight"] = codes(n, K, seed=i)
        tensors[f"{prefix}{name}.weight_scale"] = SCALES[name] * np.float32(1 + seed)
        tensors[f"{prefix}{name}.bias"] = weight(n, seed=i)
    return tensors


def zeros(*stack: int, per_channel: bool = True) -> dict:
    kernel = PaddedKernel.from_dense(jnp.zeros((*stack, K, N)), per_channel=per_channel)
    return {"qkv": {"kernel": kernel, "bias": jnp.zeros((*stack, N))}}


def assert_saved(file, tensors) -> None:
    saved, _ = parse(file)
    assert saved.keys() == tensors.keys()
    for name, wanted in tensors.items():
        if wanted.dtype == E4M3:
            scale = np.asarray(tensors[f"{name}_scale"], "f8")
            got = saved[name].astype("f8") * np.asarray(saved[f"{name}_scale"], "f8")
            np.testing.assert_array_equal(got, wanted.astype("f8") * scale)
        if not name.endswith("_scale"):
            assert saved[name].shape == wanted.shape and bits(saved[name]) == bits(wanted)


@pytest.mark.parametrize("size", [100, 5_000_000_000])
def test_shards_come_back_as_they_were(size, tmp_path):
    file = write(tmp_path / "model.safetensors", source())
    params = update_params({"attn": zeros()}, load_safetensors(file, fuse=FUSE))
    if size > 100:
        save_safetensors(params, tmp_path / "saved.safetensors", split=SPLIT)
        assert_saved(tmp_path / "saved.safetensors", source())
    save_safetensors(params, tmp_path / "saved", split=SPLIT, max_shard_bytes=size)
    again = load_safetensors(tmp_path / "saved", fuse=FUSE)
    assert_same_bits(update_params({"attn": zeros()}, again), params)


def test_shards_of_a_stack_come_back_as_they_were(tmp_path):
    tensors = source("h.0.", 0) | source("h.1.", 1) | source("h.2.", 2)
    names = [
        (r"h\.(\d)\.(\w)\.weight", r"h/\2/kernel[\1]"),
        (r"h\.(\d)\.(\w)\.bias", r"h/\2/bias[\1]"),
    ]
    back = [
        (r"h/(\w)/kernel\[(\d)\]", r"h.\2.\1.weight"),
        (r"h/(\w)/bias\[(\d)\]", r"h.\2.\1.bias"),
    ]
    file = write(tmp_path / "model.safetensors", tensors)
    params = update_params({"h": zeros(3)}, load_safetensors(file, names=names, fuse=FUSE))
    save_safetensors(params, tmp_path / "saved.safetensors", names=back, split=SPLIT)
    assert_saved(tmp_path / "saved.safetensors", tensors)


def test_one_scale_and_the_scale_of_the_input_are_copied(tmp_path):
    tensors = {}
    for name in SHARDS:
        tensors |= {k: v for k, v in source().items() if k.startswith(f"attn.{name}.")}
        tensors |= {f"attn.{name}.weight_scale": scalar(0.3), f"attn.{name}.input_scale": scalar(3)}
    file = write(tmp_path / "model.safetensors", tensors)
    tree = {"attn": zeros(per_channel=False)}
    tree["attn"]["qkv"]["x_scale"] = jnp.float32(1)
    config = fp8(activation_scheme="static")
    params = update_params(tree, load_safetensors(file, fuse=FUSE, config=config))
    save_safetensors(params, tmp_path / "saved.safetensors", split=SPLIT)
    assert_saved(tmp_path / "saved.safetensors", tensors)
    saved, _ = parse(tmp_path / "saved.safetensors")
    for name in SHARDS:
        for last, value in (("weight_scale", 0.3), ("input_scale", 3)):
            assert saved[f"attn.{name}.{last}"].shape == ()
            assert saved[f"attn.{name}.{last}"] == np.float32(value)


def test_float_layers_are_taken_apart_and_others_left(tmp_path):
    kernel, bias = weight(K, N).astype(BF16), weight(N)
    params = {
        "qkv": {"kernel": jnp.asarray(kernel), "bias": bias, "x_scale": jnp.ones(())},
        "out": {"kernel": weight(K, 4)},
    }
    save_safetensors(params, tmp_path / "saved.safetensors", split=SPLIT)
    wanted, start = {"out.weight": params["out"]["kernel"].T}, 0
    for name, n in SHARDS.items():
        rows = slice(start, start + n)
        wanted[f"{name}.weight"] = kernel.T[rows]
        wanted[f"{name}.bias"] = bias[rows]
        wanted[f"{name}.x_scale"] = scalar(1)
        start += n
    assert_saved(tmp_path / "saved.safetensors", wanted)


def test_a_shard_keeps_no_other_on_the_host():
    from jaxfp8.checkpoint._save import _read

    fused = jnp.asarray(codes(96, 32))
    read = _read(fused, (), (32, 32), rows=slice(32, 64), columns=32)
    assert read.base is None or read.base.nbytes == read.nbytes
    assert bits(read) == bits(np.asarray(fused)[32:64])
