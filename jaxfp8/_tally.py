"""Which leaves of a stream are new, which old, and which rows of a fused one."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxfp8._accounting import Entry, Index, Path, is_calibration, path_name, shown_index
from jaxfp8._shards import features_of
from jaxfp8.padded import PaddedKernel
from jaxfp8.shards import bounds


Shards = dict[str, dict[str, tuple[int, int]]]


@dataclasses.dataclass(frozen=True)
class Part:
    """A leaf, one element of a stack, or a shard of either.

    Attributes:
        name: the path of the leaf.
        index: of the element, in the leaf's leading axes; `()` for all of them.
        shard: the name of the shard; None for all rows.
    """

    name: str
    index: Index = ()
    shard: str | None = None

    def __str__(self) -> str:
        shard = f"[{self.shard}]" if self.shard is not None else ""
        return (self.name or path_name(())) + shown_index(self.index) + shard

    def within(self, other: Part | None) -> bool:
        """Whether it is `other`, or a part of it."""
        return (
            other is not None
            and self.name == other.name
            and self.index[: len(other.index)] == other.index
            and other.shard in (None, self.shard)
        )


class Tally:
    """The leaves of a tree by name, and what of each has been written.

    A leaf's units are its shards, or those of each element once one of its elements is written.
    """

    def __init__(self, tree: Mapping[Path, Entry], shards: Shards):
        self._bytes = {
            "/".join(path): sum(leaf.nbytes for leaf in jax.tree.leaves(entry.node))
            for path, entry in tree.items()
        }
        self._shapes = {"/".join(path): _stack_of(entry.node) for path, entry in tree.items()}
        self._calibrations = {"/".join(p) for p in tree if is_calibration(p, dict(tree))}
        self._shards = shards
        # None: the whole leaf. Else the parts that were written, and the bytes counted for them.
        self._done: dict[str, dict[Part, int] | None] = {}

    @property
    def total_bytes(self) -> int:
        """The size of the tree."""
        return sum(self._bytes.values())

    def __contains__(self, name: str) -> bool:
        return name in self._bytes

    def rows(self, name: str, shard: str) -> tuple[int, int]:
        """Start and stop of a shard's rows."""
        return self._shards[name][shard]

    def check_new(self, part: Part) -> None:
        """Check that a leaf, or a part of it, is in the tree and has not been written.

        Raises:
            ValueError: if it is not, or it was.
        """
        if part.name not in self._bytes:
            near = difflib.get_close_matches(part.name, self._bytes, n=1)
            raise ValueError(
                "`params` has no such leaf. "
                + (f"Did you mean {near[0]!r}? " if near else "")
                + "Leave it out, or name it in `ignore` of `reload_stream`."
            )
        self._check_shard(part)
        done = self._done.get(part.name, {})
        if done is None or part in done:
            raise ValueError(
                "it was already written in this stream, which takes each leaf once. Look for a "
                "name that is given twice; to write it again, open another `reload_stream`."
            )
        for other in done:
            if len(other.index) != len(part.index):
                raise ValueError(
                    f"this leaf was begun with {other} in this stream, and has to be written by "
                    "the same axes throughout. Give the rest as that was given."
                )
        if over := [o for o in done if o.index == part.index and None in (o.shard, part.shard)]:
            raise ValueError(
                f"its shards {', '.join(str(other.shard) for other in over)} were already written "
                "in this stream. Put the others by shard too."
                if part.shard is None
                else "it was already written in this stream, with all its shards at once."
            )

    def _check_shard(self, part: Part) -> None:
        if part.shard is None:
            return
        if part.name not in self._shards:
            raise ValueError(
                f"shard {part.shard!r} cannot be placed, because no shards are declared for it. "
                'Say which rows they are: reload_stream(params, shards={"*/qkv": {"q": 4096, "k": '
                '1024, "v": 1024}}), where the pattern is of the path without the leaf\'s name.'
            )
        if part.shard not in self._shards[part.name]:
            declared = ", ".join(self._shards[part.name])
            raise ValueError(f"it has no shard {part.shard!r}; those declared are {declared}.")

    def record(self, part: Part) -> int:
        """Note what was written, and return its bytes."""
        size, done = self._bytes[part.name], dict(self._done.get(part.name) or {})
        elements = math.prod(self._shapes[part.name][: len(part.index)])
        own, features = 1, 1
        if part.shard is not None:
            start, stop = self._shards[part.name][part.shard]
            own, features = stop - start, max(end for _, end in self._shards[part.name].values())
        counted = sum(done.values())
        done[part] = size * own // (features * elements)
        self._done[part.name] = done
        if self._missing(part.name):
            return done[part]
        self._done[part.name] = None  # Whole: with what the divisions above cut off.
        return size - counted

    def want_x_scale(self, kernel: str) -> None:
        """A kernel came from an FP8 checkpoint: the static scale of its x may not be left out."""
        self._calibrations.discard(f"{kernel.removesuffix('kernel')}x_scale")

    def _missing(self, name: str) -> list[Part]:
        done = self._done.get(name, {})
        if done is None:
            return []
        if not done:
            return [Part(name)]
        whole = {part.index for part in done if part.shard is None}
        shards = self._shards.get(name, {})
        found = []
        for index in np.ndindex(*self._shapes[name][: len(next(iter(done)).index)]):
            rest = [s for s in shards if Part(name, index, s) not in done]
            if index in whole:
                continue
            if len(rest) == len(shards):
                found.append(Part(name, index))
            else:
                found += [Part(name, index, shard) for shard in rest]
        return found

    def updated(self) -> tuple[Part, ...]:
        """What is new: leaves, and the parts of those that are new in part."""
        return tuple(
            part
            for name, parts in self._done.items()
            for part in ([Part(name)] if parts is None else parts)
        )

    def old(self) -> tuple[Part, ...]:
        """What is not: leaves, and the parts of those that are new in part."""
        return tuple(part for name in self._bytes for part in self._missing(name))

    def missing(self) -> tuple[Part, ...]:
        """`old`, without the calibration constants, which may be left out."""
        names = (name for name in self._bytes if name not in self._calibrations)
        return tuple(part for name in names for part in self._missing(name))


def _stack_of(node: Any) -> tuple[int, ...]:
    return node.stack if isinstance(node, PaddedKernel) else tuple(getattr(node, "shape", ()))


def declared_shards(shards: Mapping[str, Any], tree: Mapping[Path, Entry]) -> Shards:
    """The rows of every shard of every leaf that a pattern declares to be fused.

    Raises:
        TypeError: if sizes are not a mapping of names to ints.
        ValueError: if a pattern matches no layer, or two declare a leaf differently; if sizes do
            not add up; or if a kernel has one scale per tensor.
    """
    found: Shards = {}
    for pattern, sizes in shards.items():
        hits = {
            path: entry.node
            for path, entry in tree.items()
            if fnmatch.fnmatchcase("/".join(path[:-1]), pattern)
            and not is_calibration(path, dict(tree))
        }
        if not hits:
            layers = sorted({"/".join(path[:-1]) for path in tree})
            near = difflib.get_close_matches(pattern, layers, n=2, cutoff=0.0)
            raise ValueError(
                f"`shards` declares {pattern!r}, but no layer of `params` has such a path (there "
                f"is {' and '.join(near)}). The pattern is of the path of the layer, without "
                "`/kernel`; `*` stands for any characters."
            )
        for path, node in hits.items():
            name = "/".join(path)
            try:
                if isinstance(node, PaddedKernel) and not node.per_channel:
                    raise ValueError(
                        "it has one scale per tensor, and rows with a scale of their own would "
                        "change the meaning of all others. Initialise the layer with "
                        "per_channel=True, or put the whole weight."
                    )
                rows = bounds(sizes, features_of(node))
                if found.setdefault(name, rows) != rows:
                    raise ValueError("two patterns match it, and declare different shards.")
            except (TypeError, ValueError) as error:
                raise type(error)(
                    f"`shards[{pattern!r}]` does not fit {Part(name)}: {error}"
                ) from error
    return found
