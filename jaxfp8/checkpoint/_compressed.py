"""What compressed-tensors says of its quantization: `float-quantized`, by tensor and by channel.

Read as vLLM does (`quantization/compressed_tensors/`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxfp8.checkpoint._quantization import (
    REMEDY,
    Activation,
    LayerConfig,
    Quantization,
    Strategy,
    strings,
)


# The formats that store one value a weight, of the type that `weights` states: early files of
# floats say `int-quantized`. vLLM takes the three (`is_activation_quantization_format`).
FORMATS = ("float-quantized", "naive-quantized", "int-quantized")


def compressed_tensors(content: Mapping[str, Any], where: str) -> Quantization:
    """The quantization that a `quantization_config` of compressed-tensors describes.

    Raises:
        ValueError: if it describes another than by tensor or by channel, or is not understood.
    """
    stated = content.get("format", "float-quantized")
    # None, where only the KV cache is quantized.
    groups = content.get("config_groups") or {}
    sparsity = content.get("sparsity_config") or {"format": "dense"}
    if not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense":
        raise ValueError(f"{where} is sparse ({sparsity!r:.100}), which is not read. {REMEDY}")
    if content.get("transform_config"):
        raise ValueError(
            f"{where} has a `transform_config`, rotations that the model would have to undo, which "
            f"is not read. {REMEDY}"
        )
    if not isinstance(groups, Mapping):
        raise ValueError(
            f"`config_groups` in {where} must be an object, but it is {groups!r:.100}. Get the "
            "config that was written with the checkpoint."
        )
    result: list[tuple[str, LayerConfig]] = []
    for name, group in groups.items():
        here = f"{where}, group {name!r},"
        if _is_of_attention(group):
            continue
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            raise ValueError(f"{here} must hold `weights`, but it is {group!r:.100}.")
        if (format := group.get("format") or stated) not in FORMATS:
            raise ValueError(
                f"{here} has format {format!r}, but only {', '.join(map(repr, FORMATS))} are "
                f"read. {REMEDY}"
            )
        layer = LayerConfig(
            _weight_strategy(group["weights"], here),
            _activation(group.get("input_activations"), here),
        )
        targets = strings(group.get("targets"), "targets", here)
        result.extend((target, layer) for target in targets)
    # Which modules are of a class is not in a checkpoint: one with an e4m3 weight is taken for a
    # Linear. A target that names it goes before one for its class.
    linear = [layer for target, layer in result if target.lower() == "linear"]
    return Quantization(
        where,
        strings(content.get("ignore"), "ignore", where),
        tuple(result),
        default=linear[0] if linear else None,
    )


def _is_of_attention(group: Any) -> bool:
    """Whether it quantizes queries, keys and values, which are of no dense layer.

    vLLM leaves such groups out too (`CompressedTensorsConfig.from_config`): `LlamaAttention`.
    """
    targets = group.get("targets") if isinstance(group, Mapping) else None
    return (
        isinstance(targets, list)
        and len(targets) == 1
        and isinstance(targets[0], str)
        and targets[0].endswith("Attention")
        and group.get("weights") is None
    )


def _weight_strategy(weights: Mapping[str, Any], where: str) -> Strategy:
    kind = (weights.get("type"), weights.get("num_bits"))
    if kind != ("float", 8) or not weights.get("symmetric", True) or weights.get("dynamic"):
        raise ValueError(
            f"{where} quantizes weights as {dict(weights)!r:.300}, but only symmetric, static "
            f"8-bit floats are read. {REMEDY}"
        )
    strategies: dict[object, Strategy] = {"tensor": "tensor", "channel": "channel"}
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "tensor")
    if strategy in strategies:
        return strategies[strategy]
    blocks = " (block-quantized)" if strategy == "block" else ""
    raise ValueError(
        f"{where} has weight strategy {strategy!r}{blocks}, which is not supported: only "
        f"'tensor' and 'channel' are. {REMEDY}"
    )


def _activation(inputs: Any, where: str) -> Activation:
    if inputs is None:  # Weights only: vLLM computes in 16 bits, here x is quantized all the same.
        return "dynamic"
    if isinstance(inputs, Mapping):
        kind = (inputs.get("type"), inputs.get("num_bits"), inputs.get("symmetric", True))
        if kind == ("float", 8, True) and inputs.get("dynamic") is True:
            return "dynamic"
        if kind == ("float", 8, True) and (inputs.get("strategy") or "tensor") == "tensor":
            if not inputs.get("dynamic"):
                return "static"
    raise ValueError(
        f"{where} quantizes activations as {inputs!r:.300}, but only symmetric 8-bit floats are "
        "read, dynamic, or static with one scale a tensor. Quantize it with dynamic activations."
    )
