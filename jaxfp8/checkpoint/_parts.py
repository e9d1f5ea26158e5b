"""What a tensor of a checkpoint is on its way into the tree: a parameter, or a part of one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np

from jaxfp8.checkpoint._names import Target
from jaxfp8.checkpoint._weights import Weight


KERNEL = "kernel"
BIAS = "bias"
X_SCALE = "x_scale"


@dataclasses.dataclass(frozen=True)
class Part:
    """The whole of a parameter, or one element of its stack.

    Attributes:
        origin: the tensors that it comes from, for messages.
        kind: a float weight `[N, K]`, a quantized one, or another array.
        pieces: its value: arrays to be joined along the first axis; one if it has no axes.
        scale: float32 `[]` or `[N]` if it is quantized.
        ignored: whether the config leaves its module dense.
    """

    origin: str
    kind: Literal["dense", "fp8", "array"]
    pieces: tuple[np.ndarray, ...]
    scale: np.ndarray | None = None
    ignored: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the joined pieces."""
        first = self.pieces[0]
        return (sum(map(len, self.pieces)), *first.shape[1:]) if first.ndim else ()

    @property
    def dtype(self) -> np.dtype:
        """The dtype of every piece."""
        return self.pieces[0].dtype

    @property
    def scale_per_channel(self) -> np.ndarray:
        """The scale of a quantized part, one for each output feature."""
        assert self.scale is not None
        return np.broadcast_to(self.scale, self.shape[:1])

    def __str__(self) -> str:
        return f"{self.origin}, {self.dtype} {self.shape}"


def parts_of(weight: Weight, targets: Iterable[Target]) -> Iterator[tuple[Target, Part]]:
    """A tensor at each of its paths, and the scale of its layer's input beside it.

    Raises:
        ValueError: if a float tensor that is no matrix is to be a kernel.
    """
    array, origin = weight.tensor.array, str(weight.tensor)
    for target in targets:
        kind: Literal["dense", "fp8", "array"] = "array"
        if weight.scale is not None:
            kind = "fp8"
        elif target.path[-1] == KERNEL:
            kind = "dense"
            if array.ndim != 2:
                raise ValueError(
                    f"{origin} has shape {array.shape}, but {target} is taken for the kernel of a "
                    "dense layer, whose weight is [out_features, in_features]. Give it a path "
                    "that does not end in 'kernel', and convert it yourself."
                )
        yield target, Part(origin, kind, (array,), weight.scale, weight.ignored)
        if weight.input_scale is not None:
            scale = Part(f"the input scale of {origin}", "array", (weight.input_scale,))
            yield target.sibling(X_SCALE), scale


def collect(found: Iterable[tuple[Target, Part]]) -> dict[Target, Part]:
    """The parts by target.

    Raises:
        ValueError: if two are for one target.
    """
    parts: dict[Target, Part] = {}
    for target, part in found:
        if target in parts:
            raise ValueError(
                f"{target} would be made twice: from {parts[target]}, and from {part}. Give one "
                "of them another path in `names`, or leave it out."
            )
        parts[target] = part
    return parts
