"""Tensors into safetensors files: written beside, then renamed; a failure leaves the old ones."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxfp8.checkpoint._files import HF_QUANT_CONFIG, INDEX, read_json


@dataclasses.dataclass(frozen=True)
class Output:
    """A tensor to be written.

    Attributes:
        shape, dtype: of the tensor.
        read: brings it to the host.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_file(
    file: Path, outputs: Mapping[str, Output], quantization: Mapping[str, Any] | None
) -> None:
    """All tensors into one file, the quantization into its metadata."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with _replacing([file]) as (temporary,):
        _write(temporary, outputs, quantization)


def write_directory(
    folder: Path,
    outputs: Mapping[str, Output],
    quantization: Mapping[str, Any] | None,
    max_shard_bytes: int,
) -> None:
    """Tensors into files of at most a size, with an index, and config.json beside them.

    Raises:
        ValueError: if the folder holds other safetensors files, which a reader would mix in, or a
            description of another quantization.
    """
    shards = _shards(outputs, max_shard_bytes)
    count = len(shards)
    files = [folder / f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    files = files if count > 1 else [folder / "model.safetensors"]
    if (folder / HF_QUANT_CONFIG).exists():
        raise ValueError(
            f"`path` is {folder}, which holds {HF_QUANT_CONFIG}, and a reader would take it for "
            "what these files are. Remove it, or save elsewhere."
        )
    index = [folder / f"model.safetensors{INDEX}"] if count > 1 else []
    found = {*folder.glob("*.safetensors"), *folder.glob(f"*.safetensors{INDEX}")}
    if others := sorted(file.name for file in found - {*files, *index}):
        raise ValueError(
            f"`path` is {folder}, which holds {', '.join(others)}, and a reader would mix them "
            f"with {', '.join(file.name for file in files)}. Remove them, or save elsewhere."
        )
    config = _config(folder / "config.json", quantization)
    folder.mkdir(parents=True, exist_ok=True)
    # In the order in which they take their names: the index and the config when all tensors have.
    last = [*index, *([folder / "config.json"] if config is not None else [])]
    with _replacing([*files, *last]) as temporaries:
        for temporary, shard in zip(temporaries[:count], shards, strict=True):
            _write(temporary, {name: outputs[name] for name in shard}, quantization)
        if index:
            weight_map = {
                name: file.name for file, shard in zip(files, shards, strict=True) for name in shard
            }
            total = sum(output.nbytes for output in outputs.values())
            content = {"metadata": {"total_size": total}, "weight_map": weight_map}
            temporaries[count].write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if config is not None:
            temporaries[-1].write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _config(file: Path, quantization: Mapping[str, Any] | None) -> dict[str, Any] | None:
    config = read_json(file) if file.is_file() else {}
    kept = {
        k: v for k, v in config.items() if k not in ("quantization_config", "compression_config")
    }
    if quantization is not None:
        kept["quantization_config"] = quantization
    return kept if kept != config else None


def _shards(outputs: Mapping[str, Output], max_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, output in outputs.items():
        if shards[-1] and filled + output.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += output.nbytes
    return shards


def _write(
    file: Path, outputs: Mapping[str, Output], quantization: Mapping[str, Any] | None
) -> None:
    try:
        from safetensors.numpy import save_file
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "`save_safetensors` writes through the safetensors package, which is not installed: "
            "`pip install 'jaxfp8[checkpoint]'`."
        ) from error
    # "pt": the orientation of the weights is torch's (Transformers refuses files without it).
    metadata = {"format": "pt"}
    if quantization is not None:
        metadata["quantization_config"] = json.dumps(quantization)
    save_file({name: output.read() for name, output in outputs.items()}, file, metadata=metadata)


@contextlib.contextmanager
def _replacing(files: Iterable[Path]) -> Iterator[list[Path]]:
    """Temporary files beside `files`, which take their names in that order if all goes well."""
    files = list(files)
    temporaries = [file.with_name(f".{file.name}.{os.getpid()}.tmp") for file in files]
    try:
        yield temporaries
        for temporary in temporaries:
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
        for temporary, file in zip(temporaries, files, strict=True):
            os.replace(temporary, file)
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
