"""From a path to tensors by name: memory maps, viewed in place, and no pickle."""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from jaxfp8.checkpoint._header import read_header


INDEX = ".index.json"
# Beside the files of NVIDIA ModelOpt, instead of a `quantization_config` in config.json or with it.
HF_QUANT_CONFIG = "hf_quant_config.json"
# Files of Mistral's own layout, which lie beside those of the same model in Transformers' layout
# (vLLM: `DefaultModelLoader._prepare_weights`).
MISTRAL = "consolidated"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint.

    Attributes:
        name: its name there.
        file: the file that holds it.
        array: a read-only view of the memory map.
    """

    name: str
    file: Path
    array: np.ndarray

    def __str__(self) -> str:
        return f"tensor {self.name!r} in {self.file}"


@dataclasses.dataclass(frozen=True)
class Files:
    """The tensors of a checkpoint.

    Attributes:
        source: the path that was asked for.
        folder: where the files lie, and config.json beside them.
        tensors: by name.
        metadata: what the files say of themselves; of one file, the last wins.
    """

    source: Path
    folder: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def open_files(path: str | os.PathLike[str]) -> Files:
    """Map the tensors of one file, of a directory, or of the files that an index names.

    Raises:
        FileNotFoundError: if there is no such path, or no safetensors file behind it.
        ValueError: if a file is not intact, or a name is in two files.
    """
    source = Path(path)
    if not source.exists():
        raise FileNotFoundError(
            f"`path` is {source}, but there is nothing. Give a .safetensors file, a directory of "
            f"them, or a *{INDEX}."
        )
    index = source if source.name.endswith(INDEX) else None
    files = [source]
    if source.is_dir():
        files, index = _in_directory(source)
    named: dict[str, str] = {}
    if index is not None:
        named = _read_index(index)
        files = [index.parent / file for file in sorted(set(named.values()))]
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for file in files:
        found, said = map_file(file)
        for name, tensor in found.items():
            if name in tensors:
                raise ValueError(
                    f"tensor {name!r} is in two files, {tensors[name].file} and {file}. Remove one "
                    "of them, or give `path` as the file that is meant."
                )
            tensors[name] = tensor
        metadata |= said
    for name, file_name in named.items():
        if name not in tensors or tensors[name].file.name != file_name:
            raise ValueError(
                f"{index} says that tensor {name!r} is in {file_name}, but it is "
                f"{'in ' + tensors[name].file.name if name in tensors else 'not there'}. The index "
                "is of another checkpoint: get the one that was written with these files."
            )
    return Files(source, source if source.is_dir() else source.parent, tensors, metadata)


def map_file(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of one file as views of its memory map, and its metadata."""
    stored, metadata = read_header(file)
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    data = np.frombuffer(mapped, np.uint8)
    return {
        name: Tensor(name, file, data[t.start : t.stop].view(t.dtype).reshape(t.shape))
        for name, t in stored.items()
    }, metadata


def _in_directory(folder: Path) -> tuple[list[Path], Path | None]:
    indices = sorted(folder.glob(f"*.safetensors{INDEX}"))
    files = sorted(folder.glob("*.safetensors"))
    if len(indices) > 1:
        raise ValueError(
            f"{folder} holds {len(indices)} indices, {', '.join(i.name for i in indices)}. Give "
            "`path` as the one that is meant."
        )
    if not (files or indices):
        raise FileNotFoundError(
            f"`path` is {folder}, which holds no *.safetensors. Give the directory of a checkpoint "
            "in that format; other formats (pickle among them) are not read."
        )
    own = [file for file in files if file.name.startswith(MISTRAL)]
    if not indices and own and len(own) < len(files):
        other = next(file for file in files if file not in own)
        raise ValueError(
            f"{folder} holds {own[0].name} beside {other.name}, as Mistral publishes a model in "
            "two layouts, and no index that says which is meant. Give `path` as the one that is."
        )
    return files, next(iter(indices), None)


def _read_index(index: Path) -> dict[str, str]:
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
        raise ValueError(
            f"{index} must hold a `weight_map` from names of tensors to names of files, but it is "
            f"{named!r:.200}. Get the index that was written with the checkpoint."
        )
    for name, file in named.items():
        # What the file says must not lead out of its folder, on any system.
        if file in ("", "..") or {PurePosixPath(file).name, PureWindowsPath(file).name} != {file}:
            raise ValueError(
                f"{index} says that tensor {name!r} is in {file!r}, but it may only name files in "
                "its own folder. Do not use this checkpoint if you do not know where it is from."
            )
        if not (index.parent / file).is_file():
            raise FileNotFoundError(
                f"{index} says that tensor {name!r} is in {file}, but {index.parent} has no such "
                "file. Download the missing part of the checkpoint."
            )
    return named


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: if the file does not hold one.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}. Get it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, but it is a {type(content).__name__}.")
    return content
