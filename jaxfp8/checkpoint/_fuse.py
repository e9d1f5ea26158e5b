"""Modules of a checkpoint joined into one, and one taken apart; values are never requantized."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from jaxfp8.checkpoint._names import Target, ignore_hint
from jaxfp8.checkpoint._parts import BIAS, KERNEL, X_SCALE, Part


def split(
    parts: Mapping[Target, Part], modules: Mapping[str, Mapping[str, int]]
) -> Iterator[tuple[Target, Part]]:
    """Fused modules taken apart: `{"qkv": {"q": 4096, "k": 1024, "v": 1024}}`.

    The rows of a weight or a bias are views of the fused ones, with the scales of these rows; the
    scale of the input is the same for all.

    Raises:
        ValueError: if the sizes do not add up to those of the fused weight.
    """
    for target, part in parts.items():
        module = _module(target)
        if module not in modules:
            yield target, part
            continue
        sizes = modules[module]
        if part.shape and sum(sizes.values()) != part.shape[0]:
            raise ValueError(
                f"{target} has {part.shape[0]} output features ({part}), but `split` takes it "
                f"apart into {dict(sizes)}, {sum(sizes.values())} in all. Correct the sizes."
            )
        start = 0
        for name, size in sizes.items():
            yield _renamed(target, name), _rows(part, slice(start, start + size))
            start += size


def fuse(
    parts: Mapping[Target, Part], modules: Mapping[str, Sequence[str]]
) -> Iterator[tuple[Target, Part]]:
    """Modules made of others: `{"qkv": ("q", "k", "v")}`, output features in that order.

    Values are joined as they are. Where scales differ they become one for each output feature,
    which is exact; requantizing to the largest, as vLLM does, is not. A shard that has a kernel
    and no bias, where another has one, gets a bias of zeros, which adds nothing: Whisper's k_proj
    (vLLM fills it in `whisper._create_fake_bias_for_k_proj`).

    Raises:
        ValueError: if other shards are missing, or do not fit each other.
    """
    fused_of = {shard: fused for fused, shards in modules.items() for shard in shards}
    groups: dict[Target, dict[str, Part]] = {}
    for target, part in parts.items():
        module = _module(target)
        if module in fused_of:
            groups.setdefault(_renamed(target, fused_of[module]), {})[module] = part
        else:
            yield target, part
    for target, found in groups.items():
        shards = modules[_module(target)]
        found = found | dict(_zero_biases(target, shards, found, parts))
        if missing := [name for name in shards if name not in found]:
            of_no_layer = ignore_hint(target.path[-1:])
            hint = of_no_layer and ignore_hint(other.path[-1] for other in parts)
            raise ValueError(
                f"{target} is fused of {', '.join(shards)}, but nothing is there for "
                f"{', '.join(missing)}; there is {'; '.join(map(str, found.values()))}. Get the "
                f"whole checkpoint, or correct `names` and `fuse`.{hint}"
            )
        yield target, _joined(target, [found[name] for name in shards])


def _zero_biases(
    target: Target, shards: Sequence[str], found: Mapping[str, Part], parts: Mapping[Target, Part]
) -> Iterator[tuple[str, Part]]:
    """The biases that shards with a kernel lack, like those that are there."""
    if target.path[-1] != BIAS:
        return
    like = next(iter(found.values()))
    for name in shards:
        kernel = parts.get(_renamed(target, name).sibling(KERNEL))
        if name not in found and kernel is not None:
            zeros = np.zeros(kernel.shape[:1], like.dtype)
            yield name, Part(f"no bias for {kernel.origin}", "array", (zeros,), None, like.ignored)


def check_modules(
    fuse: Mapping[str, Sequence[str]], split: Mapping[str, Mapping[str, int]]
) -> None:
    """Check what modules are to be joined and taken apart.

    Raises:
        ValueError: if a module is named twice, or has no output features.
    """
    shards = [shard for found in fuse.values() for shard in found]
    if any(isinstance(found, str) for found in fuse.values()) or len({*shards}) < len(shards):
        raise ValueError(
            f"`fuse` must give each fused module the names of its shards, each shard once, but it "
            f"is {dict(fuse)}. For example {{'qkv': ('q', 'k', 'v')}}."
        )
    if not all(
        isinstance(found, Mapping)
        and found
        and all(isinstance(size, int) and size > 0 for size in found.values())
        for found in split.values()
    ):
        raise ValueError(
            f"`split` must give each shard its output features, at least 1, but it is "
            f"{dict(split)}. For example {{'qkv': {{'q': 4096, 'k': 1024, 'v': 1024}}}}."
        )


def _module(target: Target) -> str:
    return target.path[-2] if len(target.path) > 1 else ""


def _renamed(target: Target, module: str) -> Target:
    return Target((*target.path[:-2], module, target.path[-1]), target.index)


def _rows(part: Part, rows: slice) -> Part:
    if not part.shape:
        return part
    (piece,) = part.pieces
    scale = part.scale[rows] if part.scale is not None and part.scale.ndim else part.scale
    origin = f"rows {rows.start} to {rows.stop} of {part.origin}"
    return dataclasses.replace(part, origin=origin, pieces=(piece[rows],), scale=scale)


def _joined(target: Target, shards: list[Part]) -> Part:
    origin = " + ".join(shard.origin for shard in shards)
    if target.path[-1] == X_SCALE:
        # One x for all: the largest scale keeps every shard's calibrated range.
        return Part(origin, "array", (np.max([shard.pieces[0] for shard in shards]),))
    if len({shard.ignored for shard in shards}) > 1:
        listed = "; ".join(
            f"{shard}, {'not quantized' if shard.ignored else 'quantized'}" for shard in shards
        )
        raise ValueError(
            f"{target} is fused of shards of which the config quantizes only some: {listed}. "
            "Leave them apart in the model and in `fuse`, or correct the config."
        )
    if len({(shard.kind, shard.dtype, shard.shape[1:]) for shard in shards}) > 1 or not all(
        shard.shape for shard in shards
    ):
        raise ValueError(
            f"{target} is fused of shards that do not fit each other: "
            f"{'; '.join(map(str, shards))}. They must be of one dtype (all quantized or none) "
            "and one number of input features."
        )
    pieces = tuple(piece for shard in shards for piece in shard.pieces)
    return Part(origin, shards[0].kind, pieces, _joined_scale(shards), shards[0].ignored)


def _joined_scale(shards: list[Part]) -> np.ndarray | None:
    scales = [shard.scale for shard in shards if shard.scale is not None]
    if not scales:
        return None
    if all(not scale.ndim and scale == scales[0] for scale in scales):
        return scales[0]
    return np.concatenate([shard.scale_per_channel for shard in shards])
