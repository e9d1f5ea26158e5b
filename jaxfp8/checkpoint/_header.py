"""The header of one safetensors file, checked: what it holds, and where.

The format (safetensors' README): 8 bytes of length, little-endian, so many bytes of JSON, then the
tensors, without holes. Every offset comes from the file, so none is believed before it is checked.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np


# Its name in a file, and numpy's. The library's own numpy and Flax readers lack the 8-bit floats
# (safetensors 0.8.0).
DTYPES: Mapping[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "F8_E8M0": np.dtype(jnp.float8_e8m0fnu),
}
# The library's own limit; a length beyond it is a corrupt file, not a long list of tensors.
MAX_HEADER = 100_000_000
MAX_AXES = 32
AGAIN = "Copy or download the file again."


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where one tensor lies.

    Attributes:
        dtype: numpy's.
        shape: its shape.
        start, stop: its bytes, counted from the beginning of the file.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(file: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a file by name, and its metadata.

    Raises:
        ValueError: if the file is no intact safetensors file, with what is wrong and where.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        prefix = opened.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, MAX_HEADER):
            raise ValueError(
                f"{file} is truncated or no safetensors file: it has {size} bytes, and "
                + (
                    f"its first 8 give its header a length of {length}"
                    if len(prefix) == 8
                    else "the length of a header alone takes 8"
                )
                + f", where at most {max(min(size - 8, MAX_HEADER), 0)} can follow. {AGAIN}"
            )
        text = opened.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError among them.
        raise ValueError(f"{file} has a corrupt header: {error}. {AGAIN}") from error
    if not isinstance(header, dict):
        raise ValueError(
            f"{file} has a corrupt header: a {type(header).__name__}, where a JSON object of "
            f"tensors by name must be. {AGAIN}"
        )
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(
            f"{file} has a corrupt header: `__metadata__` must map strings to strings, but it is "
            f"{metadata!r:.200}. {AGAIN}"
        )
    stored = {name: _entry(file, name, entry, 8 + length) for name, entry in header.items()}
    _check_covered(file, stored, 8 + length, size)
    return stored, metadata


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} occurs twice")
    return result


def _entry(file: Path, name: str, entry: Any, data: int) -> Stored:
    where = f"tensor {name!r} in {file}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(
            f"{where} has a corrupt header entry, {entry!r:.200}: it must hold `dtype`, `shape` "
            f"and `data_offsets`, and nothing else. {AGAIN}"
        )
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise ValueError(
            f"{where} has the unknown dtype {entry['dtype']!r}. Known are {', '.join(DTYPES)}: "
            "write the checkpoint in one of them."
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(
            f"{where} has shape {shape!r:.100} and data_offsets {offsets!r:.100}, but they must be "
            f"lists: at most {MAX_AXES} integers, and a pair of them, from 0 to 2^48. {AGAIN}"
        )
    dtype = DTYPES[entry["dtype"]]
    size = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != size:
        raise ValueError(
            f"{where} has shape {shape} of {entry['dtype']}, {size} bytes, but its data_offsets "
            f"{offsets} span {offsets[1] - offsets[0]}. {AGAIN}"
        )
    return Stored(dtype, tuple(shape), data + offsets[0], data + offsets[1])


def _are_sizes(values: Any) -> bool:
    # True and False are integers too, and numpy takes neither 2^63 nor 65 axes.
    return (
        isinstance(values, list)
        and len(values) <= MAX_AXES
        and all(type(v) is int and 0 <= v < 2**48 for v in values)
    )


def _check_covered(file: Path, stored: dict[str, Stored], data: int, size: int) -> None:
    """Check that the tensors fill the file from `data` on, each byte once."""
    end, last = data, ""
    for name, tensor in sorted(stored.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.stop > size:
            raise ValueError(
                f"tensor {name!r} in {file} ends at byte {tensor.stop}, outside the file, which "
                f"has {size}: it is truncated, or its header is corrupt. {AGAIN}"
            )
        if tensor.start != end:
            what = "overlaps" if tensor.start < end else "leaves a hole after"
            raise ValueError(
                f"tensor {name!r} in {file} begins at byte {tensor.start} and {what} "
                f"{repr(last) if last else 'the header'}, which ends at {end}: the header is "
                f"corrupt. {AGAIN}"
            )
        end, last = tensor.stop, name
    if end != size:
        raise ValueError(
            f"{file} has {size} bytes, but its last tensor ends at {end}: the header is corrupt, "
            f"or something was appended. {AGAIN}"
        )
