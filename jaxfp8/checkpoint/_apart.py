"""Fused modules of a served tree taken apart as they are saved: the inverse of `fuse`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from jaxfp8._accounting import path_name
from jaxfp8.checkpoint._fuse import check_modules
from jaxfp8.checkpoint._parts import KERNEL, X_SCALE
from jaxfp8.padded import PaddedKernel


Path: TypeAlias = tuple[str, ...]
Modules: TypeAlias = Mapping[str, Mapping[str, int]]


def check_split(paths: Iterable[Path], split: Modules) -> None:
    """Check that there is something to take apart, and room for its shards.

    Raises:
        ValueError: if sizes are no sizes, a module is in no path, or a shard is there already.
    """
    check_modules({}, split)
    paths = list(paths)
    modules = {path[-2] for path in paths if len(path) > 1}
    if unknown := [module for module in split if module not in modules]:
        raise ValueError(
            f"`split` takes apart {', '.join(unknown)}, but no module of `params` has that name; "
            f"there is {', '.join(sorted(modules)) or 'none'}. Correct the name, or leave it out."
        )
    whole = [path for path in paths if len(path) < 2 or path[-2] not in split]
    owners: dict[Path, Path] = {}
    for path in paths:
        if len(path) < 2 or path[-2] not in split:
            continue
        for name in split[path[-2]]:
            shard = (*path[:-2], name)
            taken = [p for p in whole if p[: len(shard)] == shard[: len(p)]]
            first = owners.setdefault(shard, path[:-1])
            if taken or first != path[:-1]:
                there = f"that is a shard of {path_name(first)} too"
                if taken:
                    there = f"`params` has {path_name(taken[0])} already"
                raise ValueError(
                    f"`split` takes {path_name(path[:-1])} apart into {path_name(shard)} among "
                    f"others, but {there}. Give the shard another name, and its tensors the names "
                    "that they need by `names`."
                )


def shards_of(path: Path, node: Any, split: Modules) -> Iterator[tuple[Path, slice | None]]:
    """Where a parameter goes, with the output features of each shard; None for all of them.

    Raises:
        ValueError: if the sizes do not add up to its output features.
    """
    module = path[-2] if len(path) > 1 else ""
    if module not in split:
        yield path, None
        return
    sizes = split[module]
    copied = path[-1] == X_SCALE or not (isinstance(node, PaddedKernel) or node.shape)
    if not copied:
        features = node.out_features if isinstance(node, PaddedKernel) else node.shape[-1]
        if sum(sizes.values()) != features:
            raise ValueError(
                f"it has {features} output features, but `split` takes {module} apart into "
                f"{dict(sizes)}, {sum(sizes.values())} in all. Correct the sizes."
            )
    start = 0
    for name, size in sizes.items():
        yield (*path[:-2], name, path[-1]), None if copied else slice(start, start + size)
        start += size


def check_axes(shape: tuple[int, ...], last: str) -> None:
    """Check that an array of a module taken apart has output features and nothing else.

    Raises:
        ValueError: if it has other axes.
    """
    if last != KERNEL and len(shape) != 1:
        raise ValueError(
            f"it has shape {shape}, but `split` takes apart kernels and arrays [out_features]. "
            "Pass `names` that give each element of a stack a name, or leave it out with "
            "(pattern, None)."
        )
