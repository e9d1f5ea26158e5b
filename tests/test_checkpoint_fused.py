"""Fused layers in both directions: joined and taken apart without a value being rounded again."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_files import BF16, E4M3, bits, codes, compressed, fp8, scalar, write
from update_cases import assert_padding_holds, assert_same_bits, weight

from jaxfp8._lazy import LazyArray
from jaxfp8.checkpoint import load_safetensors
from jaxfp8.padded import DenseWeight, PaddedKernel, pad_quantized
from jaxfp8.update import reload_params, update_params


K = 18
# Own sizes, none a multiple of 16: the second shard begins inside a tile of the first's padding.
SHARDS = {"q": 20, "k": 10, "v": 7}
N = sum(SHARDS.values())
QKV = {"qkv": ("q", "k", "v")}


def zeros(*stack: int, n: int = N) -> PaddedKernel:
    return PaddedKernel.from_dense(jnp.zeros((*stack, K, n)))


def quantized(scales: dict[str, np.ndarray], **others: np.ndarray) -> dict[str, np.ndarray]:
    tensors = dict(others)
    for seed, (name, n) in enumerate(SHARDS.items()):
        tensors[f"attn.{name}.weight"] = codes(n, K, seed=seed)
        tensors[f"attn.{name}.weight_scale"] = scales[name]
    return tensors


def logical(kernel: PaddedKernel) -> np.ndarray:
    """value * scale in float64, `[N, K]`: exact."""
    value = np.asarray(kernel.qvalue, np.float64)[: kernel.out_features, : kernel.in_features]
    return value * np.asarray(kernel.scale, np.float64)[: kernel.out_features, None]


@pytest.mark.parametrize("change", [update_params, reload_params])
def test_float_shards_are_joined(change, tmp_path):
    tensors = {}
    for name, n in SHARDS.items():
        tensors |= {f"attn.{name}.weight": weight(n, K), f"attn.{name}.bias": weight(n)}
    loaded = load_safetensors(write(tmp_path / "model.safetensors", tensors), fuse=QKV)
    assert isinstance(loaded["attn"]["qkv"]["kernel"], DenseWeight)
    got = change({"attn": {"qkv": {"kernel": zeros(), "bias": jnp.zeros(N)}}}, loaded)
    joined = np.concatenate([tensors[f"attn.{name}.weight"] for name in SHARDS])
    assert_same_bits(got["attn"]["qkv"]["kernel"], PaddedKernel.from_dense(jnp.asarray(joined.T)))
    bias = np.concatenate([tensors[f"attn.{name}.bias"] for name in SHARDS])
    np.testing.assert_array_equal(got["attn"]["qkv"]["bias"], bias)
    assert_padding_holds(got["attn"]["qkv"]["kernel"])


@pytest.mark.parametrize("change", [update_params, reload_params])
@pytest.mark.parametrize(
    "scales",
    [
        {"q": scalar(0.01), "k": scalar(3), "v": scalar(200)},
        {"q": scalar(0.01), "k": np.linspace(1, 9, 10, dtype="f4")[:, None], "v": scalar(0.01)},
    ],
    ids=["per tensor", "one per channel"],
)
def test_scales_of_shards_become_per_channel_without_requantizing(scales, change, tmp_path):
    tensors = quantized(scales)
    file = write(tmp_path / "model.safetensors", tensors)
    loaded = load_safetensors(file, fuse=QKV)
    kernel = change({"attn": {"qkv": {"kernel": zeros()}}}, loaded)["attn"]["qkv"]["kernel"]
    values = np.concatenate([tensors[f"attn.{name}.weight"] for name in SHARDS])
    scale = np.concatenate([np.resize(scales[name], n) for name, n in SHARDS.items()])
    wanted = pad_quantized(jnp.asarray(values), jnp.asarray(scale), in_features=K, out_features=N)
    assert_same_bits(kernel, wanted)
    np.testing.assert_array_equal(
        logical(kernel), values.astype(np.float64) * scale[:, None].astype(np.float64)
    )


def test_equal_scales_stay_one_so_a_per_tensor_kernel_takes_them(tmp_path):
    tensors = quantized(dict.fromkeys(SHARDS, scalar(0.3)))
    loaded = load_safetensors(write(tmp_path / "model.safetensors", tensors), fuse=QKV)
    assert loaded["attn"]["qkv"]["kernel"].scale.shape == ()
    one = PaddedKernel.from_dense(jnp.zeros((K, N)), per_channel=False)
    got = update_params({"attn": {"qkv": {"kernel": one}}}, loaded)["attn"]["qkv"]["kernel"]
    assert float(got.scale) == np.float32(0.3)
    different = quantized({"q": scalar(0.3), "k": scalar(0.4), "v": scalar(0.3)})
    loaded = load_safetensors(write(tmp_path / "model.safetensors", different), fuse=QKV)
    with pytest.raises(ValueError, match="would lose precision"):
        update_params({"attn": {"qkv": {"kernel": one}}}, loaded)


def vllm_requantized(values: list[np.ndarray], scales: list[np.ndarray]) -> np.ndarray:
    """What vLLM serves of fused shards, value * scale in float64.

    `w8a8_utils.requantize_with_max_scale`: each shard times its scale in float16, divided by the
    largest scale, and cast, saturating (numpy's float16 arithmetic rounds as torch's).
    """
    largest = np.float32(max(scales))
    with np.errstate(over="ignore"):
        pairs = zip(values, scales, strict=True)
        dequantized = [v.astype(np.float16) * s.astype(np.float16) for v, s in pairs]
    rounded = np.concatenate(dequantized).astype(np.float32) / largest
    return np.clip(rounded, -448, 448).astype(E4M3).astype(np.float64) * np.float64(largest)


@pytest.mark.parametrize("large", [146.0, 147.0, 300.0, 1000.0])
def test_vllm_overflows_above_a_scale_of_146_and_this_is_exact(large, tmp_path):
    scales = {"q": scalar(large), "k": scalar(large / 3), "v": scalar(0.02)}
    tensors = quantized(scales)
    tensors["attn.q.weight"][0, 0] = 448
    values = [tensors[f"attn.{name}.weight"] for name in SHARDS]
    exact = np.concatenate(
        [v.astype(np.float64) * np.float64(scales[n]) for v, n in zip(values, SHARDS, strict=True)]
    )
    with np.errstate(over="ignore"):
        assert np.isinf(values[0].astype(np.float16) * np.float16(large)).any() == (large > 146)
    error = np.abs(vllm_requantized(values, list(scales.values())) - exact)
    if large >= 300:  # What became infinite became ±448 then: 224 * 300 is served as 448 * 300.
        assert error.max() > 200 * large
    # And without overflow the shard of a small scale is rounded to the subnormals of the largest.
    small = slice(-SHARDS["v"], None)
    assert error[small].max() > 0.02 * np.abs(exact[small]).max()
    loaded = load_safetensors(write(tmp_path / "model.safetensors", tensors), fuse=QKV)
    ours = update_params({"attn": {"qkv": {"kernel": zeros()}}}, loaded)["attn"]["qkv"]["kernel"]
    np.testing.assert_array_equal(logical(ours), exact)


def test_the_input_has_the_largest_of_its_scales(tmp_path):
    scales = dict.fromkeys(SHARDS, scalar(1))
    inputs = {f"attn.{n}.input_scale": scalar(s) for n, s in zip(SHARDS, (0.5, 2, 1), strict=True)}
    file = write(tmp_path / "model.safetensors", quantized(scales, **inputs))
    loaded = load_safetensors(file, fuse=QKV, config=fp8(activation_scheme="static"))
    assert float(loaded["attn"]["qkv"]["x_scale"]) == 2 and loaded["attn"].keys() == {"qkv"}


def test_a_stack_of_fused_layers(tmp_path):
    tensors = {}
    for i in range(3):
        for part, n in {"gate": 20, "up": 20}.items():
            tensors[f"h.{i}.{part}.weight"] = codes(n, K, seed=i + len(part))
            tensors[f"h.{i}.{part}.weight_scale"] = scalar(i + len(part))
    names = [(r"h\.(\d)\.(\w+)\.weight", r"h/\2/kernel[\1]")]
    file = write(tmp_path / "model.safetensors", tensors)
    loaded = load_safetensors(file, names=names, fuse={"gate_up": ("gate", "up")})
    kernel = loaded["h"]["gate_up"]["kernel"]
    assert isinstance(kernel.value, LazyArray) and kernel.value.shape == (3, 40, K)
    got = reload_params({"h": {"gate_up": {"kernel": zeros(3, n=40)}}}, loaded)
    for i in range(3):
        layer = jax.tree.map(lambda a, i=i: a[i], got["h"]["gate_up"]["kernel"])
        parts = [f"h.{i}.gate", f"h.{i}.up"]
        exact = [tensors[f"{p}.weight"].astype("f8") * tensors[f"{p}.weight_scale"] for p in parts]
        np.testing.assert_array_equal(logical(layer), np.concatenate(exact))


@pytest.mark.parametrize("kind", ["float", "per tensor", "per channel"])
def test_a_fused_tensor_is_taken_apart(kind, tmp_path):
    scale = {"per tensor": scalar(0.7), "per channel": np.linspace(1, 2, N, dtype="f4")[:, None]}
    value = weight(N, K).astype(BF16) if kind == "float" else codes(N, K)
    tensors = {"attn.qkv.weight": value, "attn.qkv.bias": weight(N)}
    if kind != "float":
        tensors["attn.qkv.weight_scale"] = scale[kind]
        tensors["attn.qkv.input_scale"] = scalar(3)
    loaded = load_safetensors(
        write(tmp_path / "model.safetensors", tensors), split={"qkv": SHARDS}
    )["attn"]
    assert loaded.keys() == SHARDS.keys()
    start = 0
    for name, n in SHARDS.items():
        rows, shard = slice(start, start + n), loaded[name]
        start += n
        assert np.shares_memory(shard["kernel"].value, loaded["q"]["kernel"].value.base)
        np.testing.assert_array_equal(shard["bias"], tensors["attn.qkv.bias"][rows])
        got = update_params({"kernel": zeros(n=n)}, {"kernel": shard["kernel"]})["kernel"]
        if kind == "float":
            wanted = PaddedKernel.from_dense(jnp.asarray(value[rows].T))
            assert_same_bits(got, wanted)
            continue
        assert float(shard["x_scale"]) == 3
        exact = value[rows].astype(np.float64) * np.resize(scale[kind], (N, 1))[rows]
        np.testing.assert_array_equal(logical(got), exact)
        assert bits(got.qvalue[:n, :K]) == bits(value[rows])


def test_taken_apart_and_joined_again_is_the_same(tmp_path):
    scale = np.linspace(1, 2, N, dtype="f4")[:, None]
    tensors = {"qkv.weight": codes(N, K), "qkv.weight_scale": scale}
    file = write(tmp_path / "model.safetensors", tensors)
    whole = load_safetensors(file)["qkv"]["kernel"]
    again = load_safetensors(file, split={"qkv": SHARDS}, fuse=QKV)["qkv"]["kernel"]
    assert bits(again.value) == bits(whole.value) and bits(again.scale) == bits(whole.scale)


@pytest.mark.parametrize("ignore", [["attn.q", "attn.k", "attn.v"], [r"re:.*\.[qkv]$"]], ids=str)
def test_all_shards_ignored_are_joined_dense(ignore, tmp_path):
    tensors = {f"attn.{name}.weight": weight(n, K).astype(BF16) for name, n in SHARDS.items()}
    file = write(tmp_path / "model.safetensors", tensors)
    loaded = load_safetensors(file, fuse=QKV, config=compressed(ignore=ignore))
    assert loaded["attn"]["qkv"]["kernel"].value.dtype == BF16


@pytest.mark.parametrize("dtype", [np.float32, BF16], ids=str)
@pytest.mark.parametrize("lacking", ["q", "k", "v"])
def test_a_shard_without_its_bias_gets_zeros(lacking, dtype, tmp_path):
    # Whisper's k_proj has none.
    tensors = quantized(dict.fromkeys(SHARDS, scalar(0.3)))
    biases = {name: weight(n, seed=n).astype(dtype) for name, n in SHARDS.items()}
    tensors |= {f"attn.{name}.bias": b for name, b in biases.items() if name != lacking}
    loaded = load_safetensors(write(tmp_path / "model.safetensors", tensors), fuse=QKV)["attn"]
    biases[lacking] = np.zeros_like(biases[lacking])
    wanted = np.concatenate([*biases.values()])
    assert bits(np.asarray(loaded["qkv"]["bias"])) == bits(wanted)
    got = update_params({"qkv": {"kernel": zeros(), "bias": jnp.zeros(N, dtype)}}, loaded)
    assert bits(got["qkv"]["bias"]) == bits(wanted)


def test_a_stack_of_layers_whose_shard_lacks_its_bias(tmp_path):
    tensors = {}
    for i in range(2):
        for name, n in SHARDS.items():
            tensors[f"h.{i}.{name}.weight"] = weight(n, K, seed=i)
            tensors[f"h.{i}.{name}.bias"] = weight(n, seed=i)
        del tensors[f"h.{i}.k.bias"]
    names = [
        (r"h\.(\d)\.(\w)\.weight", r"h/\2/kernel[\1]"),
        (r"h\.(\d)\.(\w)\.bias", r"h/\2/bias[\1]"),
    ]
    loaded = load_safetensors(write(tmp_path / "model.safetensors", tensors), names=names, fuse=QKV)
    for i, got in enumerate(np.asarray(loaded["h"]["qkv"]["bias"])):
        wanted = [tensors[f"h.{i}.q.bias"], np.zeros(10, "f4"), tensors[f"h.{i}.v.bias"]]
        np.testing.assert_array_equal(got, np.concatenate(wanted))
