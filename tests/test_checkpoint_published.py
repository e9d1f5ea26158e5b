"""What published checkpoints have that the readers of their dialects do not show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from checkpoint_dialects import FUSE, NAMES, SHARDS, Dialect, K
from checkpoint_files import BF16, E4M3, codes, compressed, fp8, scalar, write, write_config
from test_checkpoint_dialects import Model, X, logical
from update_cases import weight

from jaxfp8.checkpoint import load_safetensors
from jaxfp8.padded import DenseWeight
from jaxfp8.update import update_params


# The scales of weight and input. Mistral Medium 3.5 is published in both layouts; Ministral 3's and
# Devstral Small 2's configs are as STATIC.
LAYOUTS = {
    "Transformers": ("weight_scale_inv", "activation_scale"),
    "Mistral's own": ("qscale_weight", "qscale_act"),
}
STATIC = fp8(activation_scheme="static", modules_to_not_convert=["lm_head"], weight_block_size=None)
UP = {"up.weight": codes(20, K), "up.weight_scale": np.full(1, 0.5, BF16)}


def mistral(folder: Path, layout: str) -> dict[str, np.ndarray]:
    """Mistral's scales, of bfloat16 `[]`; its tensors by the names that vLLM gives them."""
    tensors = Dialect(STATIC, per_channel=False, static=True).save(folder)
    tensors = {n: t.astype(BF16) if n.endswith("_scale") else t for n, t in tensors.items()}
    own = dict(zip(("weight_scale", "input_scale"), LAYOUTS[layout], strict=True))
    parts = {name: name.rpartition(".") for name in tensors}
    renamed = {f"{m}.{own.get(last, last)}": tensors[n] for n, (m, _, last) in parts.items()}
    write(folder / "model.safetensors", renamed)
    return tensors


def exact(tensors: dict[str, np.ndarray], module: str) -> np.ndarray:
    module = f"model.layers.0.{module}"
    value, scale = tensors[f"{module}.weight"], tensors[f"{module}.weight_scale"]
    return value.astype(np.float64) * scale.astype(np.float64)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("described", [True, False], ids=["config.json", "no config"])
def test_mistrals_names_of_scales(layout, described, tmp_path):
    tensors = mistral(tmp_path, layout)
    if not described:
        (tmp_path / "config.json").unlink()
    loaded = load_safetensors(tmp_path, names=NAMES, fuse=FUSE)
    params = Model(static=True).init(jax.random.key(0), X)["params"]
    got = update_params(params, loaded)
    fused = np.concatenate([exact(tensors, f"self_attn.{name}") for name in SHARDS])
    down = exact(tensors, "mlp.down_proj")
    np.testing.assert_array_equal(logical(got["qkv"]["kernel"]), fused)
    np.testing.assert_array_equal(logical(got["down_proj"]["kernel"]), down)
    # The largest of q's, k's and v's: 0.5, 1 and 1.5, which bfloat16 holds.
    assert float(got["qkv"]["x_scale"]) == 1.5 and float(got["down_proj"]["x_scale"]) == 2
    qkv, _, _ = Model(static=True).apply({"params": got}, X)
    # As in test_checkpoint_dialects.py: 1.5 is exact in e4m3.
    wanted = np.asarray(X, np.float64) @ fused.T
    np.testing.assert_allclose(np.asarray(qkv, np.float64), wanted, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mistrals_input_scales_left_out_make_layers_dynamic(layout, tmp_path):
    mistral(tmp_path, layout)
    scales = f"*.{LAYOUTS[layout][1]}"
    loaded = load_safetensors(tmp_path, names=NAMES, fuse=FUSE, ignore=scales)
    update_params(Model(static=False).init(jax.random.key(0), X)["params"], loaded)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": fp8()}))
    with pytest.raises(ValueError, match=rf"dynamic scales, but a '.*{scales[1:]}' is there"):
        load_safetensors(tmp_path)


def test_one_of_two_layouts_in_a_directory(tmp_path):
    own = {"layers.0.attention.wq.weight": weight(20, K)}
    write(tmp_path / "consolidated.safetensors", own)
    assert "layers" in load_safetensors(tmp_path)  # Alone, it is the model.
    file = write(tmp_path / "model-00001-of-00001.safetensors", {"up.weight": weight(20, K)})
    assert [*load_safetensors(file)] == ["up"]
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"up.weight": file.name}}))
    assert [*load_safetensors(tmp_path)] == ["up"]


def attention() -> dict[str, Any]:
    """A group of the queries, keys and values, as llm-compressor writes it."""
    inputs = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    return {"targets": ["LlamaAttention"], "weights": None, "input_activations": inputs}


def test_quantized_attention_is_no_layer(tmp_path):
    # Beside the layers, before or behind them; its scales are those of a KV cache.
    linear = compressed("tensor", static=True)["config_groups"]["group_0"]
    tensors = {**UP, "up.input_scale": np.full(1, 2, BF16), "q_scale": scalar(1)}
    write(tmp_path / "model.safetensors", tensors)
    for groups in ([attention(), linear], [linear, attention()]):
        named = {f"group_{i}": group for i, group in enumerate(groups)}
        write_config(tmp_path, compressed(config_groups=named))
        up = load_safetensors(tmp_path, ignore="q_scale")["up"]
        assert float(up["kernel"].scale) == 0.5 and float(up["x_scale"]) == 2
        np.testing.assert_array_equal(up["kernel"].value, UP["up.weight"])


@pytest.mark.parametrize("groups", [{}, None, {"attention": attention()}], ids=str)
def test_a_quantized_cache_leaves_weights_as_they_are(groups, tmp_path):
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    config = compressed(config_groups=groups, format="dense", kv_cache_scheme=cache)
    tensors = {"up.weight": weight(20, K).astype(BF16), "self_attn.k_scale": scalar(1)}
    write(tmp_path / "model.safetensors", tensors)
    write_config(tmp_path, config)
    up = load_safetensors(tmp_path, ignore="*.k_scale")["up"]["kernel"]
    assert isinstance(up, DenseWeight)
    np.testing.assert_array_equal(up.value, tensors["up.weight"])


@pytest.mark.parametrize("format", ["float-quantized", "naive-quantized", "int-quantized"])
def test_formats_that_hold_e4m3(format, tmp_path):
    write(tmp_path / "model.safetensors", UP)
    write_config(tmp_path, compressed("tensor", format=format))
    kernel = load_safetensors(tmp_path)["up"]["kernel"]
    assert kernel.value.dtype == E4M3 and float(kernel.scale) == 0.5


@pytest.mark.parametrize("method", ["compressed_tensors", "Compressed-Tensors"])
def test_a_method_may_be_spelled_otherwise(method, tmp_path):
    config = compressed("tensor", quant_method=method)
    write(tmp_path / "model.safetensors", UP)
    assert float(load_safetensors(tmp_path, config=config)["up"]["kernel"].scale) == 0.5
