"""How the layers of a checkpoint are quantized, and which of them are not, by the module's name."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal


Strategy = Literal["tensor", "channel"]
Activation = Literal["static", "dynamic"]
# Whether an entry of a config names a module.
Match = Callable[[str, str], bool]

REMEDY = "Give the float checkpoint, or one quantized per tensor or per channel."


def by_name(entry: str, module: str) -> bool:
    """The whole name, or after `re:` a pattern for its beginning (compressed-tensors, vLLM)."""
    if entry.startswith("re:"):
        return re.match(entry[3:], module) is not None
    return entry == module


def by_wildcard(entry: str, module: str) -> bool:
    """The whole name with `fnmatch` wildcards, or `by_name` (Quark writes the one, vLLM the other).

    Quark: `quantization/model_transformation.py`; vLLM: `quantization/quark/utils.py`.
    """
    return by_name(entry, module) or fnmatch.fnmatchcase(module, entry)


def by_wildcard_or_part(entry: str, module: str) -> bool:
    """The whole name with `fnmatch` wildcards, or some of its components, one after another.

    ModelOpt writes wildcards, and wrote parts of names (`vision_model`) before 0.39. vLLM
    (`quantization/modelopt.py`) takes a part that ends within a component too, so that `mlp.gate`
    would hit `mlp.gate_proj`. Here it does not: the one is left dense, the other is not.
    """
    return fnmatch.fnmatchcase(module, entry) or f".{entry}." in f".{module}."


def by_either_end(entry: str, module: str) -> bool:
    """A pattern for the first components of a name, or its last components as they are.

    Transformers (`quantizers/quantizers_utils.py`) also takes parts of components, so that
    `layers.1` hits `layers.10` too; vLLM takes whole names alone. What both mean is this.
    """
    pattern = rf"(?:{entry})(?:\..*)?"
    return f".{module}".endswith(f".{entry}") or re.fullmatch(pattern, module) is not None


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """How the config says that a layer is quantized; None where it does not say.

    Attributes:
        strategy: one scale a weight, or one for each output feature.
        activation: whether x is quantized by a stored scale or by its own maximum.
    """

    strategy: Strategy | None = None
    activation: Activation | None = None


@dataclasses.dataclass(frozen=True)
class Quantization:
    """The quantization of a checkpoint.

    Attributes:
        where: the file and the method, for messages.
        ignored: entries for modules that stay dense.
        groups: modules by an entry, of which the first counts; None for those that stay dense.
        default: all others; None if only what an entry names is quantized.
        match: what an entry names.
    """

    where: str = "no quantization_config"
    ignored: tuple[str, ...] = ()
    groups: tuple[tuple[str, LayerConfig | None], ...] = ()
    default: LayerConfig | None = LayerConfig()
    match: Match = by_name

    def ignores(self, module: str) -> bool:
        """Whether a module is to stay dense."""
        if any(self.match(entry, module) for entry in self.ignored):
            return True
        return next((layer is None for layer in self._named(module)), False)

    def layer(self, module: str) -> LayerConfig | None:
        """How a module is quantized; None if it is not."""
        return next(self._named(module), self.default)

    def _named(self, module: str) -> Iterator[LayerConfig | None]:
        return (layer for entry, layer in self.groups if self.match(entry, module))


def strings(values: Any, key: str, where: str, *, patterns: bool = False) -> tuple[str, ...]:
    """A config's list of entries.

    Args:
        values: the list; None for an empty one.
        key, where: its name and the file, for messages.
        patterns: whether every entry is a regular expression; else only what begins with `re:`.

    Raises:
        ValueError: if it is no list of strings, or a pattern is none.
    """
    values = [] if values is None else values
    if (
        isinstance(values, str)
        or not isinstance(values, Sequence)
        or not all(isinstance(v, str) for v in values)
    ):
        raise ValueError(
            f"`{key}` in {where} must be a list of strings, but it is {values!r:.200}."
        )
    for value in values:
        if patterns or value.startswith("re:"):
            try:
                re.compile(value.removeprefix("re:"))
            except re.error as error:
                raise ValueError(
                    f"`{key}` in {where} holds {value!r}, which is no pattern: {error}."
                ) from error
    return tuple(values)
