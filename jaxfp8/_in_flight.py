"""Results of arrays of the host that are still to come: of several, never of a whole checkpoint."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import jax

from jaxfp8._send import in_host_memory


# Two of the largest matrices of a layer of Llama-3-8B in bfloat16: one comes while the device reads
# another.
LIMIT = 256 << 20


class InFlight:
    """A window on what has come and may still be read.

    On a CPU nothing is: XLA reads a numpy array where it lies, while the program runs, so there the
    window holds one parameter.

    Args:
        limit: bytes of host arrays that may be read at once; a larger one goes alone.
    """

    def __init__(self, limit: int = LIMIT):
        self._limit = limit
        self._sent: collections.deque[tuple[int, Any, Any]] = collections.deque()
        self._bytes = 0

    @property
    def labels(self) -> list[Any]:
        """Of what has been sent and not been waited for."""
        return [label for _, _, label in self._sent]

    def admit(self, sources: Sequence[Any]) -> int:
        """Wait until these may be sent too; their bytes, 0 if they are on a device already."""
        size = sum(s.nbytes for s in sources if in_host_memory(s))
        while size and self._sent and self._bytes + size > self._limit:
            self._wait()
        return size

    def sent(self, size: int, made: Any, label: Any = None) -> None:
        """Note what was sent, and the arrays that are computed from it; or what gives them.

        A function, where a later write may take these arrays, as that of the next element of a
        stack does: what it made of them is waited for then.
        """
        if not size:
            return
        self._sent.append((size, made, label))
        self._bytes += size
        if any(_is_on_cpu(array) for array in jax.tree.leaves(_now(made))):
            self.finish()

    def finish(self) -> None:
        """Wait for all: then the host arrays may be overwritten."""
        while self._sent:
            self._wait()

    def _wait(self) -> None:
        size, made, _ = self._sent[0]
        jax.block_until_ready(_now(made))
        self._sent.popleft()
        self._bytes -= size


def _now(made: Any) -> Any:
    return made() if callable(made) else made


def _is_on_cpu(array: Any) -> bool:
    if not isinstance(array, jax.Array) or isinstance(array, jax.core.Tracer):
        return False
    return any(device.platform == "cpu" for device in array.devices())
