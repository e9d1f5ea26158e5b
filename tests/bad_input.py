"""What the bad inputs of every part have in common; the cases lie in `bad_input_*.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Case:
    """A call that must be refused, and what must be left as it was.

    Attributes:
        name: what is wrong, in a few words.
        prepare: takes an empty folder; returns the tree that the call could harm, and the call.
        error: the type of the error.
        says: what its message must hold: the file and the path, what came, what was expected,
            what to do.
    """

    name: str
    prepare: Callable[[Path], tuple[Any, Callable[[], object]]]
    error: type[Exception]
    says: tuple[str, ...]
