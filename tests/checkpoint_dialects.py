"""Configs of published FP8 checkpoints, and tiny checkpoints that go with them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from checkpoint_files import BF16, codes, scalar, write, write_config
from update_cases import weight


K = 18
# Rows of q, k and v, none a multiple of 16, and of a layer that is not fused.
SHARDS = {"q_proj": 20, "k_proj": 10, "v_proj": 7}
LAYERS = {**{f"self_attn.{name}": n for name, n in SHARDS.items()}, "mlp.down_proj": 21}
NAMES = [
    (r"model\.layers\.0\.\w+\.(\w+)\.weight", r"\1/kernel"),
    (r"lm_head\.weight", "lm_head/kernel"),
]
FUSE = {"qkv": tuple(SHARDS)}


def fbgemm(**others: Any) -> dict[str, Any]:
    """As Transformers writes it."""
    return {
        "activation_scale_ub": 1200.0,
        "modules_to_not_convert": ["lm_head"],
        "quant_method": "fbgemm_fp8",
        **others,
    }


def modelopt(algorithm: str = "FP8", **others: Any) -> dict[str, Any]:
    """ModelOpt's in config.json."""
    float8 = {"dynamic": False, "num_bits": 8, "type": "float"}
    group = {"input_activations": float8, "weights": float8, "targets": ["Linear"]}
    return {
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quant_algo": algorithm,
        "kv_cache_scheme": float8,
        "producer": {"name": "modelopt", "version": "0.29.0"},
        "quant_method": "modelopt",
        **others,
    }


def hf_quant(algorithm: str = "FP8", **others: Any) -> dict[str, Any]:
    """ModelOpt's hf_quant_config.json."""
    return {
        "producer": {"name": "modelopt", "version": "0.19.0"},
        "quantization": {
            "quant_algo": algorithm,
            "kv_cache_quant_algo": "FP8",
            "exclude_modules": ["lm_head"],
            **others,
        },
    }


def spec(scheme: str = "per_tensor", *, dynamic: bool = False, **others: Any) -> dict[str, Any]:
    """How Quark describes the quantization of one tensor."""
    return {
        "ch_axis": 0 if scheme == "per_channel" else None,
        "dtype": "fp8_e4m3",
        "group_size": None,
        "is_dynamic": dynamic,
        "observer_cls": "PerTensorMinMaxObserver",
        "qscheme": scheme,
        "round_method": "half_even",
        "scale_type": "float",
        "symmetric": None,
        **others,
    }


def layer(weight: Any, inputs: Any, **others: Any) -> dict[str, Any]:
    """How Quark describes the quantization of a layer."""
    parts = {"weight": weight, "input_tensors": inputs, "output_tensors": None, "bias": None}
    return {**parts, "target_device": None, **others}


def quark(global_config: Any = None, **others: Any) -> dict[str, Any]:
    """Quark's, with the KV cache quantized."""
    cached = layer(spec(), spec(), output_tensors=spec())
    return {
        "algo_config": None,
        "exclude": ["lm_head"],
        "export": {
            "kv_cache_group": ["*k_proj", "*v_proj"],
            "min_kv_scale": 1.0,
            "pack_method": "reorder",
            "weight_format": "real_quantized",
            "weight_merge_groups": None,
        },
        "global_quant_config": global_config or layer(spec(), spec()),
        "layer_quant_config": {"*k_proj": cached, "*v_proj": cached},
        "layer_type_quant_config": {},
        "quant_method": "quark",
        "quant_mode": "eager_mode",
        **others,
    }


def quark_per_channel(**others: Any) -> dict[str, Any]:
    """Quark's by channel and by token, without a KV cache."""
    config = layer(spec("per_channel"), spec("per_channel", dynamic=True, ch_axis=1))
    return quark(config, layer_quant_config={}, export={"kv_cache_group": []}, **others)


@dataclasses.dataclass(frozen=True)
class Dialect:
    """A config, where it lies, and what it says of every layer."""

    config: Mapping[str, Any]
    per_channel: bool
    static: bool
    file: str = "config.json"

    def save(self, folder: Path) -> dict[str, np.ndarray]:
        """A checkpoint; its tensors."""
        tensors = {"lm_head.weight": weight(5, K).astype(BF16)}
        for i, (name, n) in enumerate(LAYERS.items(), 1):
            scale = np.linspace(0.01, i, n, dtype=np.float32)[:, None]
            module = f"model.layers.0.{name}"
            tensors[f"{module}.weight"] = codes(n, K, seed=i)
            tensors[f"{module}.weight_scale"] = scale if self.per_channel else scalar(0.3 * i)
            if self.static:
                tensors[f"{module}.input_scale"] = scalar(0.5 * i)
        write(folder / "model.safetensors", tensors)
        if self.file == "config.json":
            write_config(folder, self.config, architectures=["LlamaForCausalLM"])
        else:
            (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
            (folder / self.file).write_text(json.dumps(self.config))
        return tensors


TOKENS = "FP8_PER_CHANNEL_PER_TOKEN"
DIALECTS = {
    "fbgemm_fp8": Dialect(fbgemm(), per_channel=True, static=False),
    "modelopt": Dialect(modelopt(), per_channel=False, static=True),
    "modelopt, nested": Dialect(
        {**hf_quant(), "quant_method": "modelopt"}, per_channel=False, static=True
    ),
    "modelopt, lower case": Dialect(modelopt("fp8"), per_channel=False, static=True),
    "modelopt by channel": Dialect(modelopt(TOKENS), per_channel=True, static=False),
    "hf_quant_config.json": Dialect(hf_quant(), False, True, "hf_quant_config.json"),
    "hf_quant_config.json by channel": Dialect(
        hf_quant(TOKENS, kv_cache_quant_algo=None), True, False, "hf_quant_config.json"
    ),
    "quark": Dialect(quark(), per_channel=False, static=True),
    "quark by channel": Dialect(quark_per_channel(), per_channel=True, static=False),
    "quark, dynamic": Dialect(
        quark(layer(spec(), spec(dynamic=True)), layer_quant_config={}),
        per_channel=False,
        static=False,
    ),
    "quark, weights alone": Dialect(
        quark(layer(spec("per_channel"), None), layer_quant_config={}),
        per_channel=True,
        static=False,
    ),
}
