"""From parts to a tree: the elements of a stack put together, their values still in the files."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxfp8._accounting import Index, Path
from jaxfp8._lazy import LazyArray
from jaxfp8.checkpoint._names import Target
from jaxfp8.checkpoint._parts import Part
from jaxfp8.padded import DenseWeight, FP8Weight


def stack(parts: Mapping[Target, Part]) -> dict[Path, Any]:
    """The leaves by path.

    Raises:
        ValueError: if a stack has a hole, or its elements are not alike.
    """
    grouped: dict[Path, dict[Index, Part]] = {}
    for target, part in parts.items():
        grouped.setdefault(target.path, {})[target.index] = part
    return {path: _leaf(path, elements) for path, elements in grouped.items()}


def nested(leaves: Mapping[Path, Any]) -> dict[str, Any]:
    """Dicts within dicts.

    Raises:
        ValueError: if a leaf lies below another.
    """
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for depth, key in enumerate(path[:-1], 1):
            if path[:depth] in leaves:
                raise ValueError(
                    f"`names` puts a tensor at {Target(path[:depth])} and another below it, at "
                    f"{Target(path)}. Give one of them another path."
                )
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def _leaf(path: Path, elements: dict[Index, Part]) -> Any:
    if len({len(index) for index in elements}) > 1:
        listed = "; ".join(f"{Target(path, index)} from {p}" for index, p in elements.items())
        raise ValueError(
            f"{Target(path)} is filled whole and by elements of a stack: {listed}. Give every "
            "tensor of a stack its place in `names`."
        )
    sizes = tuple(max(places) + 1 for places in zip(*elements, strict=True))
    if math.prod(sizes) != len(elements):
        holes = (Target(path, index) for index in np.ndindex(*sizes) if index not in elements)
        some = ", ".join(map(str, itertools.islice(holes, 10)))
        raise ValueError(
            f"{Target(path)} is a stack of {sizes}, but {math.prod(sizes) - len(elements)} of its "
            f"elements are missing: {some}. There is "
            f"{'; '.join(map(str, elements.values()))}. Get the whole checkpoint, or correct "
            "`names`."
        )
    ordered = [elements[index] for index in np.ndindex(*sizes)]
    first = ordered[0]
    for part in ordered:
        if (part.kind, part.dtype, part.shape) != (first.kind, first.dtype, first.shape):
            raise ValueError(
                f"{Target(path)} is a stack of tensors that are not alike: {first}; {part}. Layers "
                "of one stack must be of one shape and dtype, all quantized or none."
            )
    value = _value(ordered, sizes)
    if first.kind == "array":
        return value
    if first.kind == "dense":
        return DenseWeight(value, "out_in")
    return FP8Weight(value, _scale(ordered, sizes), "out_in")


def _value(parts: list[Part], sizes: tuple[int, ...]) -> Any:
    if not parts[0].shape:
        return np.stack([part.pieces[0] for part in parts]).reshape(sizes)
    if not sizes and len(parts[0].pieces) == 1:
        return parts[0].pieces[0]
    return LazyArray(tuple(part.pieces for part in parts), sizes)


def _scale(parts: list[Part], sizes: tuple[int, ...]) -> np.ndarray:
    scales = [part.scale for part in parts if part.scale is not None]
    if any(scale.ndim for scale in scales):
        scales = [part.scale_per_channel for part in parts]
    return np.stack(scales).reshape((*sizes, *scales[0].shape))
