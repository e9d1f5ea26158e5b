"""Bad input: quantized checkpoints that lack something, or contradict their config."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from bad_input_checkpoint import loading
from checkpoint_files import codes, compressed, fp8, scalar
from update_cases import weight


N, K = 20, 18
W = weight(N, K)
CODES = codes(N, K)
UP = {"up.weight": CODES, "up.weight_scale": scalar(0.5)}


def float8(**changes: Any) -> dict[str, Any]:
    """compressed-tensors' config with weights quantized in another way."""
    config = compressed()
    config["config_groups"]["group_0"]["weights"] |= changes
    return config


def inputs(**changes: Any) -> dict[str, Any]:
    """compressed-tensors' config with activations quantized in another way."""
    config = compressed("tensor", static=True)
    config["config_groups"]["group_0"]["input_activations"] |= changes
    return config


def float8_of(targets: list[str]) -> dict[str, Any]:
    """compressed-tensors' config that quantizes the activations of modules, and no weights."""
    config = compressed()
    config["config_groups"]["group_0"] |= {"targets": targets, "weights": None}
    return config


SCALES = [
    loading(
        "a scale that is missing",
        {"up.weight": CODES},
        "'up.weight'",
        "model.safetensors",
        "'up.weight_scale'",
        "is none",
        "whole checkpoint",
    ),
    loading("two scales", {**UP, "up.weight_scale_inv": scalar(2)}, "'up.weight'", "are both"),
    loading(
        "two scales of the input",
        {**UP, "up.input_scale": scalar(1), "up.activation_scale": scalar(1)},
        "'up.weight'",
        "'up.input_scale' and 'up.activation_scale' are both",
        "`ignore`",
    ),
    loading(
        "the scale of Mistral's KV cache",
        {**UP, "k_fake_quantizer.qscale_act": scalar(1)},
        "'k_fake_quantizer.qscale_act'",
        "`ignore`",
    ),
    loading(
        "a scale without a weight",
        {"up.weight": W, "b.weight_scale": scalar(1)},
        "'b.weight_scale'",
        "no 'b.weight'",
    ),
    loading(
        "a scale of a float weight",
        {"up.weight": W, "up.weight_scale": scalar(1)},
        "'up.weight_scale'",
        "float32, which takes none",
    ),
    loading(
        "weights in e5m2",
        {"up.weight": W.astype(jnp.float8_e5m2)},
        "'up.weight'",
        "float8_e5m2",
        "only float8_e4m3fn",
    ),
    loading(
        "a scale of integers",
        {**UP, "up.weight_scale": np.array(1)},
        "'up.weight_scale'",
        "int64",
        "bfloat16, float16, float32",
    ),
    loading(
        "a scale of another length",
        {**UP, "up.weight_scale": np.ones(19, "f4")},
        "'up.weight_scale'",
        "(19,)",
        "(20,)",
        "'up.weight' of shape (20, 18)",
    ),
    loading(
        "a scale for each input feature",
        {**UP, "up.weight_scale": np.ones((1, 18), "f4")},
        "'up.weight_scale'",
        "(1, 18)",
        "Block-wise scales are not supported",
    ),
    loading(
        "scales of blocks, and no config",
        {**UP, "up.weight_scale": np.ones((2, 3), "f4")},
        "'up.weight_scale'",
        "(2, 3)",
        "Block-wise scales are not supported",
    ),
    loading(
        "a quantized tensor of three axes",
        {**UP, "up.weight": CODES.reshape(4, 5, 18)},
        "'up.weight'",
        "(4, 5, 18)",
        "[out_features, in_features]",
    ),
    loading(
        "a quantized tensor that is no `weight`",
        {"up.w13": CODES},
        "'up.w13'",
        "a name that ends in `weight`",
        "`ignore`",
    ),
    loading("a negative scale", {**UP, "up.weight_scale": scalar(-1)}, "up/kernel", "not positive"),
]

CONFIGS = [
    loading(
        "block-quantized",
        {"up.weight": CODES, "up.weight_scale_inv": np.ones((1, 1), "f4")},
        "config.json",
        "block-quantized",
        "weight_block_size [128, 128]",
        "not supported",
        config=fp8(weight_block_size=[128, 128]),
    ),
    loading(
        "block-quantized by compressed-tensors",
        UP,
        "config.json",
        "'group_0'",
        "'block'",
        "block-quantized",
        config=float8(strategy="block", block_structure=[128, 128]),
    ),
    loading(
        "weights in groups",
        UP,
        "weight strategy 'group'",
        config=float8(strategy=None, group_size=128),
    ),
    loading("integer weights", UP, "'type': 'int'", "8-bit floats", config=float8(type="int")),
    loading("asymmetric weights", UP, "'symmetric': False", config=float8(symmetric=False)),
    loading(
        "activations static by channel",
        UP,
        "'strategy': 'channel'",
        "dynamic",
        config=inputs(strategy="channel"),
    ),
    loading("integer activations", UP, "'type': 'int'", config=inputs(type="int")),
    loading(
        "another quantization method",
        UP,
        "config.json",
        "'awq'",
        "'fp8'",
        config={"quant_method": "awq"},
    ),
    loading(
        "another format",
        UP,
        "'pack-quantized'",
        "'float-quantized'",
        config=compressed(format="pack-quantized"),
    ),
    loading(
        "a sparse checkpoint",
        UP,
        "sparse-24-bitmask",
        config=compressed(sparsity_config={"format": "sparse-24-bitmask"}),
    ),
    loading(
        "rotated weights",
        UP,
        "`transform_config`",
        config=compressed(transform_config={"config_groups": {"u": {}}}),
    ),
    loading("no groups", UP, "quantizes no layer", config=compressed(config_groups={})),
    loading(
        "groups in a list",
        UP,
        "`config_groups`",
        "must be an object",
        config=compressed(config_groups=[1]),
    ),
    loading(
        "a group of a layer without weights",
        UP,
        "'group_0'",
        "must hold `weights`",
        config=float8_of(["Linear"]),
    ),
    loading(
        "a quantized layer beside attention",
        UP,
        "'up.weight'",
        "quantizes no layer",
        config=float8_of(["LlamaAttention"]),
    ),
    loading(
        "another activation scheme",
        UP,
        "activation_scheme 'token'",
        "'static' or 'dynamic'",
        config=fp8(activation_scheme="token"),
    ),
    loading("e5m2 by the config", UP, "fmt 'e5m2'", config=fp8(fmt="e5m2")),
    loading(
        "an ignore list that is a number", UP, "`ignored_layers`", "3", config=fp8(ignored_layers=3)
    ),
    loading(
        "an ignore pattern that is none",
        UP,
        "`ignore`",
        "'re:('",
        config=compressed("tensor", ignore=["re:("]),
    ),
    loading(
        "a channel's scale where the config says tensor",
        {**UP, "up.weight_scale": np.ones((N, 1), "f4")},
        "'up.weight_scale'",
        "(20, 1)",
        "strategy tensor",
        config=compressed("tensor"),
    ),
    loading(
        "a tensor's scale where the config says channel",
        UP,
        "'up.weight_scale'",
        "()",
        "strategy channel",
        config=compressed("channel"),
    ),
    loading(
        "an ignored layer that is quantized",
        UP,
        "'up.weight'",
        "'up' is not quantized",
        config=fp8(ignored_layers=["up"]),
    ),
    loading(
        "a quantized layer that no group has",
        UP,
        "'up.weight'",
        "quantizes only 're:h.*'",
        config=compressed(
            config_groups={"g": {**compressed()["config_groups"]["group_0"], "targets": ["re:h.*"]}}
        ),
    ),
    loading(
        "a static scale that is missing",
        UP,
        "config.json",
        "'up.input_scale'",
        "'dynamic'",
        config=fp8(activation_scheme="static"),
    ),
    loading(
        "a static scale under dynamic activations",
        {**UP, "up.input_scale": scalar(1)},
        "'up.input_scale'",
        "`ignore`",
        config=fp8(),
    ),
    loading(
        "a static scale for each channel",
        {**UP, "up.input_scale": np.ones(18, "f4")},
        "'up.input_scale'",
        "(18,)",
        "one number",
    ),
]


CASES = [*SCALES, *CONFIGS]
