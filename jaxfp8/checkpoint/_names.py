"""From names of tensors to paths of parameters.

A path is `"layers/mlp/up/kernel"`; `"layers/mlp/up/kernel[3]"` is element 3 of a stack, as
`nn.scan` makes them.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

from jaxfp8._accounting import shown_index, split_path


Paths: TypeAlias = str | Sequence[str] | None
# Names to paths: a function (None: it does not know the name; (): to no path), or pairs of a
# pattern for the whole name and what it becomes (None: to no path).
Names: TypeAlias = Callable[[str], Paths] | Iterable[tuple[str, Paths]]

# Scales of a KV cache, of results and bounds, as checkpoints name them: of no layer here.
NOT_OF_LAYERS = (
    *("k_scale", "v_scale", "q_scale", "kv_scale", "prob_scale"),
    *("output_scale", "prob_output_scale", "input_scale_ub"),
)


@dataclasses.dataclass(frozen=True)
class Target:
    """Where a tensor goes.

    Attributes:
        path: the keys of the tree.
        index: which element of the stack it is; `()` for the whole parameter.
    """

    path: tuple[str, ...]
    index: tuple[int, ...] = ()

    def __str__(self) -> str:
        return "/".join(self.path) + shown_index(self.index)

    def sibling(self, name: str) -> Target:
        """Another parameter of the same layer."""
        return Target((*self.path[:-1], name), self.index)


def parse_target(text: str) -> Target:
    """`"layers/up/kernel[3]"` as a Target.

    Raises:
        ValueError: if it is no such path.
    """
    path, index = split_path(text)
    keys = tuple(path.split("/"))
    if not all(keys) or {"[", "]"} & {*path}:
        raise ValueError(
            f"`names` gives the path {text!r}, but a path is keys joined by '/', with the element "
            "of a stack behind it in brackets: 'layers/mlp/up/kernel[3]'."
        )
    return Target(keys, index)


def default_path(name: str, axes: int) -> str:
    """`"mlp.up.weight"` to `"mlp/up/kernel"`, and any other name with its dots as slashes.

    A weight of one axis is what torch calls a LayerNorm's scale.
    """
    *module, last = name.split(".")
    if last == "weight":
        last = "kernel" if axes > 1 else "scale"
    return "/".join((*module, last))


def drop_ignored(names: Iterable[str], ignore: str | Sequence[str]) -> list[str]:
    """The names that none of the patterns (`fnmatch`) of `ignore` matches.

    Raises:
        TypeError: if `ignore` is not a pattern or several.
    """
    try:
        patterns = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    except TypeError as error:
        raise TypeError(
            f"`ignore` must be a pattern or several, but it is {ignore!r}. Leave it out to ignore "
            "nothing."
        ) from error
    return [n for n in names if not any(fnmatch.fnmatchcase(n, p) for p in patterns)]


def ignore_hint(names: Iterable[str]) -> str:
    """What to do about tensors that no layer has, by the last parts of their names; "" if none."""
    found = sorted({*names} & {*NOT_OF_LAYERS})
    if not found:
        return ""
    patterns = ", ".join(repr(f"*.{name}") for name in found)
    return (
        f" No dense layer has {' or '.join(found)} (of a KV cache, or of a result): unless your "
        f"model does, leave them out with ignore=({patterns},)."
    )


def map_names(
    tensors: Mapping[str, int], names: Names | None, *, source: object
) -> dict[str, list[Target]]:
    """Where each tensor goes: to no path if it is dropped, to several if they share it.

    Args:
        tensors: how many axes each has.
        names: None for `default_path`.
        source: what they are of, for messages.

    Raises:
        ValueError: if a name is not mapped (all are listed), or two tensors go to one path.
        TypeError: if `names` is not a function or pairs.
    """

    def by_default(name: str) -> str:
        return default_path(name, tensors[name])

    lookup = as_function(by_default if names is None else names)
    found = {name: lookup(name) for name in tensors}
    if unmatched := [name for name, paths in found.items() if paths is None]:
        raise ValueError(
            f"`names` has no path for {len(unmatched)} tensors of {source}: "
            f"{', '.join(unmatched)}. Add pairs for them, (pattern, None) to leave them out, or "
            f"name them in `ignore`.{ignore_hint(name.split('.')[-1] for name in unmatched)}"
        )
    result = {name: [*map(parse_target, paths or ())] for name, paths in found.items()}
    _check_distinct(result, source)
    return result


def as_function(names: Names) -> Callable[[str], Sequence[str] | None]:
    """`names` as a function to a list of results; None for what it does not know.

    Raises:
        TypeError: if it is not a function or pairs.
    """
    if not callable(names):
        return _pairs(names)

    def lookup(name: str) -> Sequence[str] | None:
        found = names(name)
        return [found] if isinstance(found, str) else found

    return lookup


def _pairs(pairs: Iterable[tuple[str, Paths]]) -> Callable[[str], Sequence[str] | None]:
    if isinstance(pairs, Mapping):
        raise TypeError(
            "`names` must be a function or pairs of a regular expression and a path, in the order "
            "in which they count, but it is a mapping. Take its `.items()`."
        )
    try:
        compiled = [(re.compile(pattern), paths) for pattern, paths in pairs]
    except (TypeError, ValueError, re.error) as error:
        raise TypeError(
            "`names` must be a function from names to paths, or pairs of a regular expression for "
            f"the whole name and the path it becomes, but it holds something else: {error}."
        ) from error

    def lookup(name: str) -> Sequence[str] | None:
        for pattern, paths in compiled:
            if match := pattern.fullmatch(name):
                paths = () if paths is None else [paths] if isinstance(paths, str) else paths
                try:
                    return [match.expand(path) for path in paths]
                except (re.error, IndexError, TypeError) as error:
                    raise ValueError(
                        f"`names` turns {name!r}, which {pattern.pattern!r} matches, into "
                        f"{paths!r}, but that cannot be: {error}. Name the groups of the pattern "
                        f"alone, of which there are {pattern.groups}: \\1 is the first."
                    ) from error
        return None

    return lookup


def _check_distinct(targets: dict[str, list[Target]], source: object) -> None:
    owners: dict[Target, str] = {}
    for name, found in targets.items():
        for target in found:
            if (first := owners.setdefault(target, name)) != name:
                raise ValueError(
                    f"`names` gives tensors {first!r} and {name!r} of {source} the same path, "
                    f"{target}. Give each its own, an element of a stack as {target}[0]."
                )
