"""What a checkpoint says of its quantization: where that is found, and who reads it.

The dialects are those that vLLM's FP8 linear layers read (vLLM: `quantization/`). What is not read
is refused by name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxfp8.checkpoint._compressed import compressed_tensors
from jaxfp8.checkpoint._dialects import fbgemm_fp8, fp8, modelopt
from jaxfp8.checkpoint._files import HF_QUANT_CONFIG, Files, read_json
from jaxfp8.checkpoint._quantization import REMEDY, Quantization
from jaxfp8.checkpoint._quark import quark


READERS: dict[str | None, Callable[[Mapping[str, Any], str], Quantization]] = {
    "fp8": fp8,
    "compressed-tensors": compressed_tensors,
    "fbgemm_fp8": fbgemm_fp8,
    "modelopt": modelopt,
    "quark": quark,
}


def read_quantization(
    config: Mapping[str, Any] | str | os.PathLike[str] | None, files: Files
) -> Quantization:
    """The quantization that `config` describes, or the files, or the JSON beside them.

    Raises:
        ValueError: if the config is not understood, or describes another quantization.
    """
    content, where = _find(config, files)
    if content is None:
        return Quantization()
    if not isinstance(content, Mapping):
        raise ValueError(
            f"`quantization_config` in {where} must be an object, but it is "
            f"{type(content).__name__}. {REMEDY}"
        )
    method = content.get("quant_method")
    if method is None and _is_modelopt(content):
        method = "modelopt"
    if isinstance(method, str) and method.lower().startswith("modelopt_"):
        # `modelopt_fp4` and others; its quant_algo says more.
        return modelopt(content, f"{where} (quant_method {method!r})")
    reader = READERS.get(_normalized(method))
    if reader is None:
        *first, last = map(repr, READERS)
        raise ValueError(
            f"{where} has quant_method {method!r}, but only {', '.join(first)} and {last} are "
            f"read. {REMEDY} If the files hold `weight` in e4m3 and `weight_scale` all the same, "
            "say so: config={'quant_method': 'fp8'}."
        )
    return reader(content, f"{where} (quant_method {method!r})")


def _normalized(method: object) -> str | None:
    """As vLLM does (`ModelConfig._verify_quantization`)."""
    if not isinstance(method, str):
        return None
    return method.lower().replace("compressed_tensors", "compressed-tensors")


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
    # In the order in which vLLM looks (`model_loader/weight_utils.get_quant_config`).
    for name in ("config.json", HF_QUANT_CONFIG):
        beside = files.folder / name
        if beside.is_file() and (content := _within(read_json(beside))) is not None:
            return content, str(beside)
    return None, ""


def _within(config: Mapping[str, Any]) -> Any:
    # `compression_config` is compressed-tensors' older name; models of several parts put theirs
    # into the text's.
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping):
            for key in ("quantization_config", "compression_config"):
                if part.get(key) is not None:
                    return part[key]
    return config if "quant_method" in config or _is_modelopt(config) else None


def _is_modelopt(content: Mapping[str, Any]) -> bool:
    """Whether it is what hf_quant_config.json holds, which names no method."""
    details = content.get("quantization", content)
    return isinstance(details, Mapping) and "quant_algo" in details
