"""Which leaves of a stream are new, which old, and which rows of a fused one."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping
from typing import Any

import jax

from jaxfp8._accounting import Entry, Path, is_calibration, path_name
from jaxfp8._shards import features_of
from jaxfp8.padded import PaddedKernel
from jaxfp8.shards import bounds


Shards = dict[str, dict[str, tuple[int, int]]]


class Tally:
    """The leaves of a tree by name, and what of each has been written."""

    def __init__(self, tree: Mapping[Path, Entry], shards: Shards):
        self._bytes = {
            "/".join(path): sum(leaf.nbytes for leaf in jax.tree.leaves(entry.node))
            for path, entry in tree.items()
        }
        self._calibrations = {"/".join(p) for p in tree if is_calibration(p, dict(tree))}
        self._shards = shards
        # None: the whole leaf. Else the shards that were written, and the bytes counted for them.
        self._done: dict[str, dict[str, int] | None] = {}

    @property
    def total_bytes(self) -> int:
        """The size of the tree."""
        return sum(self._bytes.values())

    def rows(self, name: str, shard: str) -> tuple[int, int]:
        """Start and stop of a shard's rows."""
        return self._shards[name][shard]

    def check_new(self, name: str, shard: str | None) -> None:
        """Check that a leaf, or a shard of it, is in the tree and has not been written.

        Raises:
            ValueError: if it is not, or it was.
        """
        if name not in self._bytes:
            near = difflib.get_close_matches(name, self._bytes, n=1)
            raise ValueError(
                "`params` has no such leaf. "
                + (f"Did you mean {near[0]!r}? " if near else "")
                + "Leave it out, or name it in `ignore` of `reload_stream`."
            )
        parts = self._done.get(name, {})
        if parts is None or shard in parts:
            raise ValueError(
                "it was already written in this stream, which takes each leaf once. Look for a "
                "name that is given twice; to write it again, open another `reload_stream`."
            )
        if shard is None:
            if parts:
                raise ValueError(
                    f"its shards {', '.join(parts)} were already written in this stream. Put the "
                    "others by shard too."
                )
            return
        if name not in self._shards:
            raise ValueError(
                f"shard {shard!r} cannot be placed, because no shards are declared for it. Say "
                'which rows they are: reload_stream(params, shards={"*/qkv": {"q": 4096, "k": '
                '1024, "v": 1024}}), where the pattern is of the path without the leaf\'s name.'
            )
        if shard not in self._shards[name]:
            raise ValueError(
                f"it has no shard {shard!r}; those declared are {', '.join(self._shards[name])}."
            )

    def record(self, name: str, shard: str | None) -> int:
        """Note what was written, and return its bytes."""
        size, parts = self._bytes[name], self._done.get(name) or {}
        counted = sum(parts.values())
        if shard is None:
            self._done[name] = None
            return size
        start, stop = self._shards[name][shard]
        features = max(end for _, end in self._shards[name].values())
        parts[shard] = size * (stop - start) // features
        if len(parts) < len(self._shards[name]):
            self._done[name] = parts
            return parts[shard]
        self._done[name] = None  # Whole: with what the divisions above cut off.
        return size - counted

    def updated(self) -> tuple[str, ...]:
        """What is new: leaves, and `leaf[shard]` of those that are new in part."""
        return tuple(
            label
            for name, parts in self._done.items()
            for label in ([shown(name)] if parts is None else [shown(name, s) for s in parts])
        )

    def old(self) -> tuple[str, ...]:
        """What is not: leaves, and `leaf[shard]` of those that are new in part."""
        result = []
        for name in self._bytes:
            parts = self._done.get(name, {})
            if parts:
                result += [shown(name, s) for s in self._shards[name] if s not in parts]
            elif parts is not None:
                result.append(shown(name))
        return tuple(result)

    def missing(self) -> tuple[str, ...]:
        """`old`, without the calibration constants, which may be left out."""
        return tuple(name for name in self.old() if name not in self._calibrations)


def shown(name: str, shard: str | None = None) -> str:
    """A leaf, or one shard of it, for messages."""
    return (name or path_name(())) + (f"[{shard}]" if shard is not None else "")


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
                    f"`shards[{pattern!r}]` does not fit {shown(name)}: {error}"
                ) from error
    return found
