"""Arrays that are put together from pieces of files only when they are read.

A fused or stacked weight lies in a checkpoint in pieces. Joined when the files are opened, all of
them would be on the host at once; joined when they are written, one is.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np


if TYPE_CHECKING:
    from jaxtyping import Shaped


# Of buffers in XLA on a CPU (tsl/framework/allocator.h, Allocator::kAllocatorAlignment).
ALIGNMENT = 64


@dataclasses.dataclass(frozen=True, eq=False)
class LazyArray:
    """Arrays joined along their first axis, and those stacked along new axes, when they are read.

    Equivalent numpy: `np.stack([np.concatenate(parts) for parts in pieces])`, reshaped to
    `[*stack, N, *rest]`. `np.asarray` makes it, every time anew; nothing is kept.

    Attributes:
        pieces: for each element of the stack, in row-major order, the arrays that are joined:
            `[N_i, *rest]`, all of one dtype and `rest`, the N_i adding up to the same N.
        stack: the leading axes; `()` for a single element.
    """

    pieces: tuple[tuple[Shaped[np.ndarray, "N_i *rest"], ...], ...]
    stack: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole."""
        parts = self.pieces[0]
        return (*self.stack, sum(len(part) for part in parts), *parts[0].shape[1:])

    @property
    def dtype(self) -> np.dtype:
        """The dtype of every piece."""
        return self.pieces[0][0].dtype

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of the whole, once it is made."""
        return self.size * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError(
                "`copy` must not be False: this array is put together from several pieces of a "
                "file, which is a copy. Leave `copy` out."
            )
        whole = _aligned(self.shape, self.dtype)
        elements = whole.reshape(len(self.pieces), *self.shape[len(self.stack) :])
        for element, parts in zip(elements, self.pieces, strict=True):
            np.concatenate(parts, out=element)
        return whole if dtype is None else whole.astype(dtype, copy=False)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """`np.empty` that XLA on a CPU reads where it is; what begins elsewhere it copies first."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
