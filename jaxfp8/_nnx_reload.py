"""New weights for a served NNX module, in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx

from jaxfp8._nnx_variables import ActivationScale, FP8Param
from jaxfp8.update import ReloadError, reload_params


# What a checkpoint holds of a model: neither random streams nor caches.
WEIGHTS = nnx.Any(nnx.Param, nnx.BatchStat, FP8Param, ActivationScale)


def reload_model(
    model: nnx.Module,
    loaded: Any,
    *,
    only: Any = WEIGHTS,
    partial: bool = False,
    ignore: str | Sequence[str] = (),
    allow_nonfinite: bool = False,
    progress: bool | Callable[[int, int], None] = False,
) -> None:
    """Write new weights into the buffers of a served module, after everything was checked.

    Equivalent JAX: `nnx.update(model, reload_params(nnx.state(model, only), loaded))`, which is as
    safe until the device fails: after a ReloadError this leaves in the module what is new and what
    is still old, instead of deleted buffers. No function of the model recompiles, and no buffer
    moves. Arrays taken from the model before are deleted.

    Serve with `nnx.jit(f, graph_updates=False)`, or `jax.jit` over the module: a plain `nnx.jit`
    returns every Variable of its arguments, so at each call it copies the whole model elsewhere
    (seen with flax 0.12.6 and 0.12.8).

    Args:
        model: the served module.
        loaded: the trainer's module (of which `only` is taken), its nnx.State, or a tree of the
            same paths, as `reload_params` takes it. The module itself is let go with its last
            reference; Flax's `nnx.state(module, filter)` would leave cycles that hold its arrays
            until Python's garbage collector runs.
        only: NNX filter of the Variables to be written; by default `WEIGHTS`: nnx.Param,
            nnx.BatchStat, FP8Param and ActivationScale.
        partial: as in `reload_params`, like `ignore`, `allow_nonfinite` and `progress`.

    Raises:
        TypeError, ValueError, ReloadError: as `reload_params`.
    """
    # Not nnx.state(model, only): that leaves cycles, which hold the trainer's arrays until Python's
    # collector comes by (flax 0.12.6 to 0.12.12).
    served = nnx.split(model, only, ...)[1]
    if isinstance(loaded, nnx.Module):
        loaded = nnx.split(loaded, only, ...)[1]
    options: dict[str, Any] = {"partial": partial, "ignore": ignore, "progress": progress}
    try:
        state = reload_params(served, loaded, allow_nonfinite=allow_nonfinite, **options)
    except ReloadError as error:
        nnx.update(model, error.params)
        raise
    nnx.update(model, state)
