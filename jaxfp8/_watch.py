"""What every FP8 layer of a model sees, read out while the model runs."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxfp8._accounting import Path, ignored, path_name
from jaxfp8._ptq_layer import is_dense_call, result_dtype, stored_kernel
from jaxfp8.inputs import QuantizedInput
from jaxfp8.linen import PaddedFP8Dense
from jaxfp8.padded import PaddedKernel
from jaxfp8.quantize import absolute_maximum, is_fp8, scale_from_amax


# Beside each kernel, for the time of a calibration: a number for each matrix of its stack, which
# `nn.scan` and `nn.vmap` hand to the layer along with the matrix.
_SLOT = "calibration_slot"


class Watch:
    """What each layer has seen: a slot for each matrix, stacked ones included.

    Args:
        tree: the kernels, and whatever else is in a tree of params.
        kind: what its layers are called, in messages.
        quantized: whether they are of a QuantizedModel, whose FP8 layers are nn.Dense.
    """

    def __init__(
        self, tree: Mapping[Path, Any], *, kind: str = "PaddedFP8Dense", quantized: bool = False
    ):
        self._quantized = quantized
        self._what = "FP8 layer" if quantized else f"{kind} layer"
        self._shapes: dict[Path, tuple[int, ...]] = {}
        self._starts: dict[Path, int] = {}
        self._padded: set[Path] = set()
        count = 0
        for path, node in tree.items():
            shape = getattr(_matrix(node), "shape", ())
            if path[-1:] == ("kernel",) and len(shape) >= 2:
                layer = path[:-1]
                self._shapes[layer], self._starts[layer] = tuple(shape[:-2]), count
                count += math.prod(shape[:-2])
                if isinstance(node, PaddedKernel):
                    self._padded.add(layer)
        self._amax = np.full(count, -1.0, np.float32)  # -1: not reached.
        self._order: dict[Path, int] = {}
        self._given_quantized: set[int] = set()
        self._faults: list[int] = []
        self._lock = threading.Lock()  # Callbacks come from the runtime's threads.

    def with_slots(self, params: Any, path: Path = ()) -> Any:
        """The tree with a slot's number beside every kernel.

        Static scales go: an nn.Dense has one where the tree does, and is to run without.
        """
        if not isinstance(params, Mapping):
            return params
        result = {key: self.with_slots(child, (*path, str(key))) for key, child in params.items()}
        if path in self._shapes:
            if self._quantized and path in self._padded:
                result.pop("x_scale", None)
            result[_SLOT] = self.slots(path)
        return result

    def slots(self, path: Path) -> jax.Array:
        """The numbers of a layer's matrices."""
        shape = self._shapes[path]
        numbers = np.arange(math.prod(shape), dtype=np.int32) + np.int32(self._starts[path])
        return jax.device_put(numbers.reshape(shape))

    def intercept(self, call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        """Look at the input of a layer, and run it with dynamic scales."""
        layer = context.module
        ours = isinstance(layer, PaddedFP8Dense) and context.method_name == "__call__"
        stock = is_dense_call(context) and stored_kernel(layer) is not None
        if not (ours or stock) or not layer.has_variable("params", _SLOT):
            return call(*args, **kwargs)
        slot: Any = layer.get_variable("params", _SLOT)
        args, kwargs = self.watched(layer, slot, args, kwargs)
        if ours and layer.static_x_scale and is_fp8(layer.param_dtype):
            x = args[0] if args else kwargs["inputs"]
            if not isinstance(x, QuantizedInput | tuple):
                dynamic = layer.clone(parent=None, name=None, static_x_scale=False)
                own = {k: v for k, v in layer.variables["params"].items() if k != _SLOT}
                return dynamic.apply({"params": own}, *args, **kwargs)
        return call(*args, **kwargs)

    def watched(self, layer: Any, slot: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments of a layer, whose input passes by `_note` on its way.

        Args:
            layer: it has a `path` and a `dtype`.
            slot: the number of the matrix that it multiplies by.
            args, kwargs: those of its call.
        """
        self._order.setdefault(tuple(layer.path), len(self._order))
        x = args[0] if args else kwargs["inputs"]
        if isinstance(x, QuantizedInput):
            x = dataclasses.replace(x, scale=x.scale * self._seen(self._note_quantized, slot))
        elif isinstance(x, tuple) and len(x) == 2:
            x = (x[0], x[1] * self._seen(self._note_quantized, slot))
        elif _is_real(x, layer) and np.size(x):
            own = result_dtype(layer, x) if isinstance(layer, nn.Dense) else layer.dtype
            wide = jnp.asarray(x, own).astype(jnp.float32)
            amax = absolute_maximum(wide, tuple(range(wide.ndim))).reshape(())
            x = x if jnp.issubdtype(x.dtype, jnp.floating) else wide
            x = x * self._seen(self._note, slot, amax).astype(x.dtype)
        else:  # The layer refuses it, or there is nothing in it.
            return args, kwargs
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "inputs": x})

    @staticmethod
    def _seen(note: Callable[..., None], slot: Any, *values: Any) -> jax.Array:
        """1, from a callback that has noted the values; XLA cannot know that it is 1.

        A callback without effects, tied to the result by a factor, because `nn.scan` refuses
        effects from flax 0.12.12 on, `nn.remat` those of `io_callback`, and `sow` is lost in a
        collection that a scan does not lift. A maximum may be noted twice.
        """

        def call(slot: Any, *values: Any) -> np.ndarray:
            note(slot, *values)
            return np.ones(np.shape(slot), np.float32)

        one = jax.ShapeDtypeStruct((), np.float32)
        return jax.pure_callback(call, one, slot, *values, vmap_method="broadcast_all")

    def check_finite(self, batch: int) -> None:
        """Refuse a NaN or an infinity seen in a batch.

        Raises:
            ValueError: if a layer saw one.
        """
        if self._faults:
            slots = sorted(set(self._faults), key=lambda s: (self._order.get(self._path(s), 0), s))
            names = map(self._name, slots)
            raise ValueError(
                f"batch {batch} of `batches` gives a NaN or an infinity to {', '.join(names)} (in "
                "the order of the calls). A scale cannot be taken from it: look at that batch, or "
                "at the weights before the first of these layers."
            )

    def scales(self, ignore: tuple[str, ...]) -> dict[str, Any]:
        """The tree of scales.

        Raises:
            ValueError: if there are none, or a layer was not reached.
        """
        tree: dict[str, Any] = {}
        missing: list[str] = []
        for path, start in self._starts.items():
            slots = range(start, start + math.prod(self._shapes[path]))
            amax = self._amax[slots.start : slots.stop].reshape(self._shapes[path])
            if (amax >= 0).all():
                node = tree
                for key in path:
                    node = node.setdefault(key, {})
                node["x_scale"] = _scale_from_amax(jax.device_put(amax))
            elif ignored(path, ignore):
                continue
            elif path in self._padded or (amax >= 0).any():
                missing += [
                    self._name(slot)
                    for slot in slots
                    if self._amax[slot] < 0 and slot not in self._given_quantized
                ]
        if missing or not tree:
            raise ValueError(
                (
                    f"no batch reaches {len(missing)} {self._what}s: {', '.join(missing)}. "
                    "Give batches, or arguments of the model, that do, or name in `ignore` the "
                    "layers that are not to have a scale."
                )
                if missing
                else f"`model` calls no {self._what} on a float input, so there is nothing "
                "to calibrate. Give the model whose layers are to have static scales."
            )
        return tree

    def _note(self, slots: Any, amax: Any) -> None:
        slots, amax = np.broadcast_arrays(slots, amax)
        for slot, value in zip(slots.ravel(), amax.ravel(), strict=True):
            with self._lock:
                if np.isfinite(value):
                    self._amax[slot] = max(self._amax[slot], value)
                else:
                    self._faults.append(int(slot))

    def _note_quantized(self, slots: Any) -> None:
        with self._lock:
            self._given_quantized.update(np.ravel(slots).tolist())

    def _path(self, slot: int) -> Path:
        return next(p for p, start in reversed(self._starts.items()) if start <= slot)

    def _name(self, slot: int) -> str:
        path = self._path(slot)
        if not self._shapes[path]:
            return path_name(path)
        index = np.unravel_index(slot - self._starts[path], self._shapes[path])
        return f"{path_name(path)}[{', '.join(map(str, map(int, index)))}]"


_scale_from_amax = jax.jit(scale_from_amax)


def _is_real(x: Any, layer: Any) -> bool:
    """Whether a layer takes x as numbers; nn.Dense makes floats of integers."""
    kinds = (jnp.floating, jnp.integer) if isinstance(layer, nn.Dense) else (jnp.floating,)
    return hasattr(x, "dtype") and any(jnp.issubdtype(x.dtype, kind) for kind in kinds)


def _matrix(node: Any) -> Any:
    return node.qvalue if isinstance(node, PaddedKernel) else node
