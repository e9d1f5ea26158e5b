"""What AMD Quark's config says of its quantization: e4m3 by tensor and by channel.

Read as Quark itself does (`quantization/model_transformation.py`) and as vLLM does
(`quantization/quark/`).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any

from jaxfp8.checkpoint._quantization import (
    REMEDY,
    Activation,
    LayerConfig,
    Quantization,
    Strategy,
    by_wildcard,
    strings,
)


DTYPE = "fp8_e4m3"
SCHEMES: dict[object, Strategy] = {"per_tensor": "tensor", "per_channel": "channel"}
# Of a RotationConfig: rotations that are computed as the model runs, not put into its weights.
ONLINE = ("online_r1_rotation", "r3", "r4")


def quark(content: Mapping[str, Any], where: str) -> Quantization:
    """The quantization that a `quantization_config` of Quark describes.

    Raises:
        ValueError: if it describes another than e4m3 by tensor or by channel, or is not understood.
    """
    _check_rotations(content.get("algo_config"), where)
    if content.get("layer_type_quant_config"):
        raise ValueError(
            f"{where} has a `layer_type_quant_config`, layers by their class, which a checkpoint "
            f"does not hold. {REMEDY}"
        )
    ignored = strings(content.get("exclude"), "exclude", where)
    by_entry = _mapping(content.get("layer_quant_config"), "layer_quant_config", where)
    export = _mapping(content.get("export"), "export", where)
    cached = strings(export.get("kv_cache_group"), "kv_cache_group", where)
    groups: list[tuple[str, LayerConfig | None]] = []
    # A name goes before patterns, and these in their order.
    for entry in sorted(by_entry, key=_is_pattern):
        config = _without_cache(entry, by_entry[entry], cached)
        groups.append((entry, _layer(config, f"layer_quant_config[{entry!r}]", where)))
    default = _layer(content.get("global_quant_config"), "global_quant_config", where)
    return Quantization(where, ignored, tuple(groups), default, by_wildcard)


def _layer(config: Any, key: str, where: str) -> LayerConfig | None:
    """How a layer is quantized; None if it is not."""
    config = _mapping(config, key, where)
    for part in ("output_tensors", "bias"):
        if config.get(part):
            raise ValueError(
                f"`{key}` in {where} quantizes {part} ({config[part]!r:.100}), which is not read. "
                f"{REMEDY}"
            )
    weight, inputs = config.get("weight"), config.get("input_tensors")
    if weight is None and inputs is None:
        return None
    strategy = SCHEMES.get(_scheme(weight))
    if strategy is None or weight.get("is_dynamic") or weight.get("ch_axis") not in (None, 0):
        raise ValueError(
            f"`{key}` in {where} quantizes weights as {weight!r:.300}, but only {DTYPE} is read, "
            f"static, per_tensor or per_channel of axis 0. {REMEDY}"
        )
    return LayerConfig(strategy, _activation(inputs, key, where))


def _activation(inputs: Any, key: str, where: str) -> Activation:
    if inputs is None:  # Weights only: here x is quantized all the same.
        return "dynamic"
    scheme = _scheme(inputs)
    if scheme in SCHEMES and inputs.get("is_dynamic") is True:
        return "dynamic"
    if scheme == "per_tensor" and not inputs.get("is_dynamic"):
        return "static"
    raise ValueError(
        f"`{key}` in {where} quantizes activations as {inputs!r:.300}, but only {DTYPE} is read, "
        "dynamic, or static and per_tensor. Quantize it with dynamic activations."
    )


def _scheme(spec: Any) -> object:
    """The scheme of symmetric e4m3; None of anything else."""
    if not isinstance(spec, Mapping) or spec.get("dtype") != DTYPE:
        return None
    return spec.get("qscheme") if spec.get("symmetric") is not False else None


def _without_cache(entry: str, config: Any, cached: tuple[str, ...]) -> Any:
    """A layer's config without what quantizes its result for the KV cache.

    vLLM does so too (`QuarkConfig.from_config`), for the query as well.
    """
    is_cached = any(fnmatch.fnmatchcase(entry, pattern) for pattern in cached)
    if not isinstance(config, Mapping) or not (is_cached or (cached and entry == "*q_proj")):
        return config
    return {key: value for key, value in config.items() if key != "output_tensors"}


def _check_rotations(algorithms: Any, where: str) -> None:
    for algorithm in algorithms if isinstance(algorithms, list) else [algorithms]:
        if not isinstance(algorithm, Mapping) or algorithm.get("name") != "rotation":
            continue
        online = algorithm.get("online_config")
        layers = online.get("online_rotation_layers") if isinstance(online, Mapping) else None
        if layers or any(algorithm.get(key) for key in ONLINE):
            raise ValueError(
                f"{where} has rotations in its `algo_config` that the model would have to compute, "
                f"which are not read. {REMEDY}"
            )


def _is_pattern(entry: str) -> bool:
    return any(character in entry for character in "*?[")


def _mapping(value: Any, key: str, where: str) -> Mapping[str, Any]:
    value = {} if value is None else value
    if not isinstance(value, Mapping):
        raise ValueError(
            f"`{key}` in {where} must be an object, but it is {value!r:.100}. Get the config that "
            "was written with the checkpoint."
        )
    return value
