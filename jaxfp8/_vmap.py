"""The batching rule of a row-wise operation: batched rows are more rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from jaxfp8._explicit import over_batch


def fold_rows(rows: tuple[bool | None, ...]) -> Callable[[Callable], Callable]:
    """Give `f(first, *rest)` a `vmap` rule that makes one large call out of a batch of rows.

    The results, one or a tuple, are matrices with a row for each row of `first`.

    Args:
        rows: for each argument, whether its first axis is the rows M of the result (of one that
            is absent it is not). None: it is if the argument has an axis at all (a per-token
            scale), and else it is shared.

    A batch in row arguments alone folds into M: one GEMM. A batch in any other argument (a
    stacked weight) is a loop of one call each.
    """

    def decorate(f: Callable) -> Callable:
        wrapped = custom_vmap(f)

        @wrapped.def_vmap
        def rule(axis_size: int, in_batched: list, *args: Any):
            outs = over_batch(fold, axis_size, in_batched, args)
            if outs is None:
                outs = fold(axis_size, in_batched, *args)
            return outs, jax.tree.map(lambda a: True, outs)

        def fold(axis_size: int, in_batched: list, *args: Any) -> Any:
            batched = [any(jax.tree.leaves(b)) for b in in_batched]
            foldable = [
                bool(is_row) and arg is not None if is_row is not None else arg.ndim - int(b) == 2
                for is_row, arg, b in zip(rows, args, batched, strict=True)
            ]
            if any(b and not fold for b, fold in zip(batched, foldable, strict=True)):
                return _loop(wrapped, axis_size, in_batched, args)
            folded = [
                _fold(arg, b, axis_size) if fold else arg
                for arg, b, fold in zip(args, batched, foldable, strict=True)
            ]
            outs = wrapped(*folded)
            # Of one example; not -1, which a batch of none leaves undetermined.
            rows_each = args[0].shape[1 if batched[0] else 0]
            return jax.tree.map(lambda a: a.reshape(axis_size, rows_each, a.shape[-1]), outs)

        return wrapped

    return decorate


def _fold(arg: jax.Array, batched: bool, axis_size: int) -> jax.Array:
    if not batched:
        arg = jnp.broadcast_to(arg, (axis_size, *arg.shape))
    return arg.reshape(-1, arg.shape[-1])


def _loop(f: Callable, axis_size: int, in_batched: list, args: tuple) -> Any:
    leaves, structure = jax.tree.flatten(list(args))
    flags = jax.tree.leaves(in_batched)

    def one(index: jax.Array) -> jax.Array:
        picked = [
            jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False) if flag else leaf
            for leaf, flag in zip(leaves, flags, strict=True)
        ]
        return f(*jax.tree.unflatten(structure, picked))

    return jax.lax.map(one, jnp.arange(axis_size))
