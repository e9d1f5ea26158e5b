"""Reading a compiled program: its custom calls, and what it does to the FP8 weights."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable
from typing import Any

from jaxfp8.padded import padded_size


INSTRUCTION = re.compile(r"= f8e4m3fn\[([\d,]*)\]\S* ([\w-]+)\(")
CUSTOM_CALL = re.compile(r'custom_call_target="([^"]+)"')
# Older XLA writes them into the program; since 2025 it forms them later, and the text has none.
COMMAND_BUFFER = re.compile(r"to_apply=%?command_buffer")
# These name a buffer and move no bytes.
FREE = {"parameter", "get-tuple-element", "bitcast", "tuple"}


def read(text: str, blocks: Iterable[tuple[int, int]]) -> dict[str, Any]:
    """Custom calls by target; operations whose result is a weight of a block, by name.

    Args:
        text: an optimized module, `compiled.as_text()`.
        blocks: `(features, hidden)` of the blocks in it.
    """
    sizes = set()
    for features, hidden in blocks:
        pair = (padded_size(features), padded_size(hidden))
        sizes |= {pair, pair[::-1]}
    touched: collections.Counter[str] = collections.Counter()
    for shape, operation in INSTRUCTION.findall(text):
        dims = tuple(int(size) for size in shape.split(",") if size)
        if dims[-2:] in sizes and operation not in FREE:
            touched[operation] += 1
    return {
        "custom_calls": dict(collections.Counter(CUSTOM_CALL.findall(text))),
        "operations_on_fp8_weights": dict(touched),
    }


def command_buffers(text: str) -> int:
    """How many command buffers (CUDA graphs) an optimized module calls, where its text says so."""
    return len(COMMAND_BUFFER.findall(text))
