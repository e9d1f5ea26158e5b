"""Checkpoints made byte by byte, without the package or the library that are under test."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from update_cases import weight

from jaxfp8.checkpoint import load_safetensors
from jaxfp8.padded import PaddedKernel
from jaxfp8.update import reload_params


E4M3 = np.dtype(jnp.float8_e4m3fn)
BF16 = np.dtype(jnp.bfloat16)
TYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": BF16,
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": E4M3,
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
}
Tensors = Mapping[str, np.ndarray]


def entries(tensors: Tensors) -> tuple[dict[str, Any], bytes]:
    """The header of a file, and what follows it."""
    names = {dtype: name for name, dtype in TYPES.items()}
    header: dict[str, Any] = {}
    data = b""
    for name, array in tensors.items():
        offsets = [len(data), len(data) + array.nbytes]
        entry = {"dtype": names[array.dtype], "shape": [*array.shape], "data_offsets": offsets}
        header[name] = entry
        data += array.tobytes()
    return header, data


def join(header: Mapping[str, Any] | bytes, data: bytes, *, shift: int = 0) -> bytes:
    """A file; `shift` spaces behind the header put the data at another alignment."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode() + b" " * shift
    return len(text).to_bytes(8, "little") + text + data


def write(
    file: Path, tensors: Tensors, *, metadata: Mapping[str, str] | None = None, shift: int = 0
) -> Path:
    """A safetensors file."""
    header, data = entries(tensors)
    if metadata is not None:
        header["__metadata__"] = metadata
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(join(header, data, shift=shift))
    return file


def parse(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """What a file holds, by another way than the package's: from its bytes, copied."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        begin, end = (start + offset for offset in entry["data_offsets"])
        array = np.array(bytearray(content[begin:end]), np.uint8).view(TYPES[entry["dtype"]])
        tensors[name] = array.reshape(entry["shape"])
    return tensors, metadata


def write_sharded(folder: Path, shards: Mapping[str, Tensors]) -> Path:
    """Files with an index."""
    for file, tensors in shards.items():
        write(folder / file, tensors)
    named = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))
    return folder


def write_config(folder: Path, quantization: Mapping[str, Any], **others: Any) -> None:
    """config.json with a `quantization_config`."""
    (folder / "config.json").write_text(json.dumps({**others, "quantization_config": quantization}))


def fp8(**others: Any) -> dict[str, Any]:
    """Hugging Face's `quantization_config`."""
    return {"quant_method": "fp8", "activation_scheme": "dynamic", **others}


def compressed(strategy: str = "channel", *, static: bool = False, **others: Any) -> dict[str, Any]:
    """compressed-tensors' `quantization_config`, as llm-compressor writes it."""
    float8 = {"num_bits": 8, "type": "float", "symmetric": True}
    inputs = {"strategy": "tensor" if static else "token", "dynamic": not static}
    group = {
        "targets": ["Linear"],
        "weights": {**float8, "strategy": strategy, "dynamic": False},
        "input_activations": {**float8, **inputs},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        **others,
    }


def codes(n: int, k: int, seed: int = 0) -> np.ndarray:
    """e4m3 `[n, k]` of every magnitude, none NaN."""
    return np.clip(weight(n, k, seed=seed) * 150, -448, 448).astype(E4M3)


def scalar(value: float) -> np.ndarray:
    """float32 `[]`."""
    return np.array(value, np.float32)


def bits(array: Any) -> bytes:
    """The bytes of an array, whatever holds it."""
    return np.asarray(array).tobytes()


def into(path: Path, **options: Any) -> tuple[Any, Callable[[], object]]:
    """A served tree of one layer, `up` of 18 to 20, and the call that loads `path` into it."""
    kernel = PaddedKernel.from_dense(jnp.asarray(weight(18, 20, seed=1)))
    params = {"up": {"kernel": kernel}}
    return params, lambda: reload_params(params, load_safetensors(path, **options))
