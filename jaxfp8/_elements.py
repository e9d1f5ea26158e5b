"""One element of a stack written, and the others left as they are, to the bit.

The layers of a model under `nn.scan` or `nn.vmap` lie in one array. Written element by element
they need no more memory beside the model than one layer does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import lax

from jaxfp8._accounting import Index, Write, shown_index
from jaxfp8._bundles import Arrays, Bundle, Method, Wanted
from jaxfp8._convert import Carry, Pad, Quantize
from jaxfp8._lazy import LazyArray
from jaxfp8.padded import PaddedKernel
from jaxfp8.quantize import FP8_DTYPE


if TYPE_CHECKING:
    from jaxtyping import Array, Bool


@dataclasses.dataclass(frozen=True)
class Element:
    """A method of `_bundles` for one element of a parameter that is a stack.

    Where it lies are the first `leading` arrays of `write`'s carry, so that all elements share a
    program; `measure` does not give them.

    Attributes:
        method: how the element is made.
        leading: how many axes the parameter has before those of the element.
    """

    method: Method
    leading: int

    @property
    def transposes(self) -> bool:
        """Whether the loaded matrix is turned on its way."""
        return self.method.transposes

    @property
    def unchecked(self) -> bool:
        """Whether `measure` reads nothing."""
        return self.method.unchecked

    def measure(self, sources: Sequence[Arrays]) -> tuple[Carry, Bool[Array, "parameters flags"]]:
        """Of the element alone."""
        return self.method.measure(sources)

    def write(
        self, buffers: Sequence[Arrays], wanted: Wanted, carry: Carry, sources: Sequence[Arrays]
    ) -> tuple[Arrays, ...]:
        """The parameter with its element at `carry[:leading]` written."""
        (own,) = buffers
        place, rest = carry[: self.leading], carry[self.leading :]
        element = tuple(_get(buffer, place) for buffer in own)
        (fresh,) = self.method.write((element,), wanted, rest, sources)
        # Written into the buffer, not returned in its place: that keeps a weak type weak.
        new = tuple(_set(b, place, f) for b, f in zip(own, fresh, strict=True))
        return (tuple(b.at[...].set(n) for b, n in zip(own, new, strict=True)),)


def _get(buffer: Any, place: Carry) -> Any:
    for index in place:
        buffer = lax.dynamic_index_in_dim(buffer, index, keepdims=False)
    return buffer


def _set(buffer: Any, place: Carry, element: Any) -> Any:
    """The buffer with its element at `place` written; e4m3 by its bits.

    Else XLA on a CPU makes float16 of all of the buffer, and e4m3 of that again: a second for each
    layer of six of 4096 x 6144, and 0.1 so (jax 0.10.2).
    """
    starts = (*place, *(np.int32(0) for _ in range(element.ndim)))
    new = lax.expand_dims(element, tuple(range(len(place))))
    if buffer.dtype != FP8_DTYPE:
        return lax.dynamic_update_slice(buffer, new, starts)
    old, new = (lax.bitcast_convert_type(array, np.uint8) for array in (buffer, new))
    return lax.bitcast_convert_type(lax.dynamic_update_slice(old, new, starts), FP8_DTYPE)


def at(index: Index) -> Carry:
    """The carry that names an element."""
    return tuple(jax.device_put(np.int32(i)) for i in index)


def abstract_element(target: Any, index: Index) -> Any:
    """The shapes and dtypes of one element of a parameter.

    Raises:
        ValueError: if the parameter has no such axes, or they are not so long.
    """
    is_kernel = isinstance(target, PaddedKernel)
    stack = target.stack if is_kernel else tuple(target.shape)
    if len(index) > len(stack):
        what = f"a stack of {stack} kernels" if is_kernel and stack else f"of shape {stack}"
        if is_kernel and not stack:
            what = "one kernel and no stack"
        raise ValueError(
            f"the index {shown_index(index)} names an element of a stack, but the parameter in "
            f"`params` is {what}. Give one index for each of its leading axes, or none."
        )
    if any(i >= size for i, size in zip(index, stack, strict=False)):
        raise ValueError(
            f"the index {shown_index(index)} is past the end: the parameter in `params` is a stack "
            f"of {stack[: len(index)]}. Count from 0."
        )

    def element(array: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape[len(index) :], array.dtype)

    if not is_kernel:
        return element(target)
    qvalue, scale = element(target.qvalue), element(target.scale)
    return PaddedKernel(qvalue, scale, target.in_features, target.out_features)


def by_element(write: Write) -> Iterator[tuple[Index, Write]]:
    """The elements of a stack of weights that lies on the host, each of them a write.

    Yields nothing for what is no stack, or is on a device already, whole.
    """
    leading = write.targets[0].ndim - 2
    if not isinstance(write.conversion, Quantize | Pad) or leading < 1:
        return
    if any(isinstance(source, jax.Array) for source in write.sources):
        return
    weight, *scales = write.sources
    if isinstance(weight, LazyArray) and len(weight.stack) != leading:
        return  # Its pieces are no elements.
    for place, index in enumerate(np.ndindex(*weight.shape[:leading])):
        # A scale per tensor may be one for all the stack.
        own = (scale[index] if scale.ndim >= leading else scale for scale in scales)
        sources = (_host_element(weight, place, index), *own)
        name = write.name + shown_index(index)
        yield index, write._replace(name=name, sources=sources)


def _host_element(weight: Any, place: int, index: Index) -> Any:
    return LazyArray((weight.pieces[place],)) if isinstance(weight, LazyArray) else weight[index]


def element_of(bundle: Bundle, index: Index) -> Bundle:
    """A bundle of one parameter as that of one element of it, whose sources are the element's."""
    return Bundle(bundle.writes, Element(bundle.method, len(index)), at(index) + bundle.place)
