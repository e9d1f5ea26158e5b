"""What a checkpoint says of its quantization: the `quantization_config` of config.json.

Two dialects are read, as vLLM's FP8 linear layers read them (vLLM: `quantization/fp8.py` and
`quantization/compressed_tensors/`): Hugging Face's `quant_method: fp8`, and compressed-tensors'
`float-quantized`. What is not read is refused by name.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxfp8.checkpoint._files import Files, read_json


Strategy = Literal["tensor", "channel"]
Activation = Literal["static", "dynamic"]
# The float formats of compressed-tensors that store one e4m3 value a weight.
FORMATS = ("float-quantized", "naive-quantized")
DEQUANTIZE = "Give the float checkpoint, or one quantized per tensor or per channel."


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """How the config says that a layer is quantized; None where it does not say.

    Attributes:
        strategy: one scale a weight, or one for each output feature.
        activation: whether x is quantized by a stored scale or by its own maximum.
    """

    strategy: Strategy | None = None
    activation: Activation | None = None


@dataclasses.dataclass(frozen=True)
class Quantization:
    """The quantization of a checkpoint.

    Attributes:
        where: the file and the method, for messages.
        ignored: names of modules that stay dense, or `re:` and a pattern for their beginning.
        groups: layers by target (a name, a pattern after `re:`, or a class of modules).
    """

    where: str = "no quantization_config"
    ignored: tuple[str, ...] = ()
    groups: tuple[tuple[str, LayerConfig], ...] = (("Linear", LayerConfig()),)

    def ignores(self, module: str) -> bool:
        """Whether a module is to stay dense: its whole name, or a pattern that matches from 0."""
        return any(_names(entry, module) for entry in self.ignored)

    def layer(self, module: str) -> LayerConfig | None:
        """How a module is quantized; None if no group has it.

        A target that names it goes before one for its class. The class is not in a checkpoint;
        a module with an e4m3 weight is taken for a Linear.
        """
        for target, layer in self.groups:
            if _names(target, module):
                return layer
        for target, layer in self.groups:
            if not target.startswith("re:") and target.lower() == "linear":
                return layer
        return None


def _names(entry: str, module: str) -> bool:
    if entry.startswith("re:"):
        return re.match(entry[3:], module) is not None
    return entry == module


def read_quantization(
    config: Mapping[str, Any] | str | os.PathLike[str] | None, files: Files
) -> Quantization:
    """The quantization that `config` describes, or the files, or config.json beside them.

    Raises:
        ValueError: if the config is not understood, or describes another quantization.
    """
    content, where = _find(config, files)
    if content is None:
        return Quantization()
    if not isinstance(content, Mapping):
        raise ValueError(
            f"`quantization_config` in {where} must be an object, but it is "
            f"{type(content).__name__}. {DEQUANTIZE}"
        )
    method = content.get("quant_method")
    readers = {"fp8": _fp8, "compressed-tensors": _compressed_tensors}
    if method not in readers:
        raise ValueError(
            f"{where} has quant_method {method!r}, but only 'fp8' and 'compressed-tensors' are "
            f"read. {DEQUANTIZE} If the files hold `weight` in e4m3 and `weight_scale` all the "
            "same (as fbgemm_fp8 and modelopt write them), say so: config={'quant_method': 'fp8'}."
        )
    return readers[method](content, f"{where} (quant_method {method!r})")


def _find(config: Any, files: Files) -> tuple[Any, str]:
    if isinstance(config, Mapping):
        return _within(config), "`config`"
    if config is not None:
        return _within(read_json(Path(config))), str(config)
    if "quantization_config" in files.metadata:
        where = f"the metadata of {files.source}"
        try:
            return json.loads(files.metadata["quantization_config"]), where
        except ValueError as error:
            raise ValueError(f"`quantization_config` in {where} is not JSON: {error}.") from error
    beside = files.folder / "config.json"
    return (_within(read_json(beside)), str(beside)) if beside.is_file() else (None, "")


def _within(config: Mapping[str, Any]) -> Any:
    # `compression_config` is compressed-tensors' older name; models of several parts put theirs
    # into the text's.
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping):
            for key in ("quantization_config", "compression_config"):
                if part.get(key) is not None:
                    return part[key]
    return config if "quant_method" in config else None


def _fp8(content: Mapping[str, Any], where: str) -> Quantization:
    if content.get("weight_block_size") is not None:
        raise ValueError(
            f"{where} is block-quantized (weight_block_size {content['weight_block_size']}), "
            f"which is not supported. {DEQUANTIZE}"
        )
    if content.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        raise ValueError(f"{where} has fmt {content['fmt']!r}, but only 'e4m3' is read.")
    scheme = content.get("activation_scheme", "dynamic")
    if scheme not in ("static", "dynamic"):
        raise ValueError(
            f"{where} has activation_scheme {scheme!r}, but it must be 'static' or 'dynamic'."
        )
    key = "ignored_layers" if content.get("ignored_layers") else "modules_to_not_convert"
    groups = (("Linear", LayerConfig(None, scheme)),)
    return Quantization(where, _strings(content.get(key), key, where), groups)


def _compressed_tensors(content: Mapping[str, Any], where: str) -> Quantization:
    stated = content.get("format", "float-quantized")
    groups = content.get("config_groups")
    sparsity = content.get("sparsity_config") or {"format": "dense"}
    if not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense":
        raise ValueError(f"{where} is sparse ({sparsity!r:.100}), which is not read. {DEQUANTIZE}")
    if content.get("transform_config"):
        raise ValueError(
            f"{where} has a `transform_config`, rotations that the model would have to undo, which "
            f"is not read. {DEQUANTIZE}"
        )
    if not isinstance(groups, Mapping) or not groups:
        raise ValueError(f"{where} must hold `config_groups`, but it has {groups!r:.100}.")
    result: list[tuple[str, LayerConfig]] = []
    for name, group in groups.items():
        here = f"{where}, group {name!r},"
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            raise ValueError(f"{here} must hold `weights`, but it is {group!r:.100}.")
        if (format := group.get("format") or stated) not in FORMATS:
            raise ValueError(
                f"{here} has format {format!r}, but only {' and '.join(map(repr, FORMATS))} are "
                f"read. {DEQUANTIZE}"
            )
        layer = LayerConfig(
            _weight_strategy(group["weights"], here),
            _activation(group.get("input_activations"), here),
        )
        targets = _strings(group.get("targets"), "targets", here)
        result.extend((target, layer) for target in targets)
    return Quantization(where, _strings(content.get("ignore"), "ignore", where), tuple(result))


def _weight_strategy(weights: Mapping[str, Any], where: str) -> Strategy:
    kind = (weights.get("type"), weights.get("num_bits"))
    if kind != ("float", 8) or not weights.get("symmetric", True) or weights.get("dynamic"):
        raise ValueError(
            f"{where} quantizes weights as {dict(weights)!r:.300}, but only symmetric, static "
            f"8-bit floats are read. {DEQUANTIZE}"
        )
    strategies: dict[object, Strategy] = {"tensor": "tensor", "channel": "channel"}
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "tensor")
    if strategy in strategies:
        return strategies[strategy]
    blocks = " (block-quantized)" if strategy == "block" else ""
    raise ValueError(
        f"{where} has weight strategy {strategy!r}{blocks}, which is not supported: only "
        f"'tensor' and 'channel' are. {DEQUANTIZE}"
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


def _strings(values: Any, key: str, where: str) -> tuple[str, ...]:
    values = [] if values is None else values
    if not isinstance(values, Sequence) or not all(isinstance(v, str) for v in values):
        raise ValueError(
            f"`{key}` in {where} must be a list of strings, but it is {values!r:.200}."
        )
    for value in values:
        if value.startswith("re:"):
            try:
                re.compile(value[3:])
            except re.error as error:
                raise ValueError(
                    f"`{key}` in {where} holds {value!r}, which is no pattern: {error}."
                ) from error
    return tuple(values)
