"""What Hugging Face's `fp8`, FBGEMM's and ModelOpt's configs say of their quantization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxfp8.checkpoint._quantization import (
    REMEDY,
    LayerConfig,
    Quantization,
    by_either_end,
    by_wildcard_or_part,
    strings,
)


# ModelOpt's algorithms (vLLM: `quantization/modelopt.py`) that are read.
ALGORITHMS = {
    "FP8": LayerConfig("tensor", "static"),
    "FP8_PER_CHANNEL_PER_TOKEN": LayerConfig("channel", "dynamic"),
}
BLOCKWISE = ("FP8_PB_WO", "FP8_PB_REAL", "FP8_BLOCK_SCALES", "MXFP8")


def fp8(content: Mapping[str, Any], where: str) -> Quantization:
    """Hugging Face's `quant_method: fp8`, as vLLM reads it (`quantization/fp8.py`).

    Raises:
        ValueError: if it is block-quantized, not e4m3, or not understood.
    """
    if content.get("weight_block_size") is not None:
        raise ValueError(
            f"{where} is block-quantized (weight_block_size {content['weight_block_size']}), "
            f"which is not supported. {REMEDY}"
        )
    if content.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        raise ValueError(f"{where} has fmt {content['fmt']!r}, but only 'e4m3' is read.")
    scheme = content.get("activation_scheme", "dynamic")
    if scheme not in ("static", "dynamic"):
        raise ValueError(
            f"{where} has activation_scheme {scheme!r}, but it must be 'static' or 'dynamic'."
        )
    key = "ignored_layers" if content.get("ignored_layers") else "modules_to_not_convert"
    ignored = strings(content.get(key), key, where)
    return Quantization(where, ignored, default=LayerConfig(None, scheme))


def fbgemm_fp8(content: Mapping[str, Any], where: str) -> Quantization:
    """FBGEMM's `quant_method: fbgemm_fp8`: a scale for each output feature, and for each row of x.

    Transformers: `integrations/fbgemm_fp8.py`; vLLM: `quantization/fbgemm_fp8.py`. Both bound the
    maximum from which a row's scale is made by `activation_scale_ub`, so that an outlier past it
    saturates and the rest of its row is rounded more finely. Here the scale is of the row's own
    maximum. `jnp.clip(x, -activation_scale_ub, activation_scale_ub)` before the layer is the same
    as the bound.

    Raises:
        ValueError: if the bound is no positive number, or the config is not understood.
    """
    bound = content.get("activation_scale_ub")
    is_number = isinstance(bound, int | float) and not isinstance(bound, bool)
    if bound is not None and not (is_number and bound > 0):
        raise ValueError(
            f"{where} has activation_scale_ub {bound!r}, but it must be a positive number. Get "
            "the config that was written with the checkpoint."
        )
    key = "modules_to_not_convert"
    ignored = strings(content.get(key), key, where, patterns=True)
    layer = LayerConfig("channel", "dynamic")
    return Quantization(where, ignored, default=layer, match=by_either_end)


def modelopt(content: Mapping[str, Any], where: str) -> Quantization:
    """NVIDIA ModelOpt's, as config.json holds it, or as hf_quant_config.json does.

    The two differ in keys (ModelOpt: `export/convert_hf_config.py`); vLLM reads both alike
    (`quantization/modelopt.py`).

    Raises:
        ValueError: if its algorithm is not read, or it is not understood.
    """
    details = content.get("quantization", content)
    algorithm = details.get("quant_algo") if isinstance(details, Mapping) else None
    # Some versions write it in lower case.
    layer = ALGORITHMS.get(str(algorithm).upper())
    if layer is None:
        blocks = " (block-quantized)" if str(algorithm).upper() in BLOCKWISE else ""
        raise ValueError(
            f"{where} has quant_algo {algorithm!r}{blocks}, but only "
            f"{' and '.join(map(repr, ALGORITHMS))} are read. {REMEDY}"
        )
    key = "exclude_modules" if details.get("exclude_modules") else "ignore"
    ignored = strings(details.get(key), key, where)
    return Quantization(where, ignored, default=layer, match=by_wildcard_or_part)
