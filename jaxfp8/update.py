"""New weights for a served model: pure (`update_params`) or in place (`reload_params`).

Both take the tree that a trainer has, pair it with the served one path by path, check everything
before anything is changed, and rewrite whole buffers: a weight's scale is recomputed with it, and
its padding is zeroed each time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax.core.meta import AxisMetadata, Partitioned

from jaxfp8._accounting import (
    Write,
    account,
    entries,
    is_calibration,
    is_variable,
    one_level,
    unbox,
)
from jaxfp8._bundles import Bundle, OneByOne, bundles
from jaxfp8._convert import Carry, convert
from jaxfp8._donate import Step, addresses, check_donatable, steps
from jaxfp8._lazy import LazyArray, put
from jaxfp8._leaf import FLOATS
from jaxfp8._placement import no_mesh, place_like
from jaxfp8.padded import PaddedKernel


class ReloadError(RuntimeError):
    """A reload that stopped half way: a device error after the checks, or a stream left early.

    Attributes:
        params: the tree as it is now: new leaves where they were written, else the old ones.
        updated: the paths already new.
        failed: the paths whose write failed; their buffers may be lost. One, or on a GPU up to 32
            of one shape, which are written by one program; none where a stream was left.
    """

    def __init__(
        self, message: str, params: Any, updated: tuple[str, ...], failed: tuple[str, ...]
    ):
        super().__init__(message)
        self.params = params
        self.updated = updated
        self.failed = failed


@no_mesh()
def update_params(
    params: Any, loaded: Any, *, partial: bool = False, ignore: str | Sequence[str] = ()
) -> Any:
    """A tree like `params` with the weights of `loaded`; nothing is changed in place.

    Equivalent JAX, for a kernel: `PaddedKernel.from_dense(loaded_kernel)`; for any other leaf:
    `loaded_leaf.astype(leaf.dtype)`. Applying it twice gives the same bits as once.

    Args:
        params: the served tree: an nnx.State, or any nesting of dicts, FrozenDicts, tuples and
            lists, with PaddedKernels and plain arrays, boxed (`nn.Partitioned`) or not. Its leaves
            may be abstract, from `jax.eval_shape` of `init`.
        loaded: a tree of the same paths; boxes and Variables do not matter. Where `params` has
            a PaddedKernel of `[*stack, N, K]`: a float array `[*stack, K, N]`, a DenseWeight, an
            FP8Weight (either layout), or a PaddedKernel of the same sizes. Elsewhere: an array of
            the same shape, cast between floats and else of the same dtype. JAX or numpy arrays,
            or those of `jaxfp8.checkpoint.load_safetensors`, which are read one at a time.
        partial: allow paths that `loaded` lacks; their present values are kept.
        ignore: patterns (`fnmatch`) of paths in `loaded` that `params` lacks, to be left out. A
            pattern may name a subtree: `"value_head"`, `"opt_*"`. One that hits nothing is fine.

    Returns:
        A tree of the structure, shapes and dtypes of `params`, per-channel or per-tensor as
        there. Written leaves are new buffers, which share nothing with `loaded`; they are placed
        like the leaf of `params` if that has a committed sharding. Leaves that were not written
        are those of `params` themselves. A static activation scale (`x_scale` beside a padded
        kernel) is a calibration constant which no trainer has: it is kept unless `loaded` has it.

    Raises:
        ValueError: if paths are missing or unexpected, or shapes, layouts or scales do not fit
            (all are listed in one error); if a weight is NaN or infinite, or a scale not
            positive. Values are checked where they are concrete: under `jit`, `vmap` or
            `eval_shape` the traced ones are not, and `quantize`'s rule holds instead (a slice
            with a NaN gets a NaN scale).
        TypeError: if only dtypes or types do not fit.
    """
    writes = account(params, loaded, partial=partial, ignore=ignore)
    carries, flags = _measure([Bundle((write,), OneByOne(write.conversion)) for write in writes])
    _check_values(flags, allow_nonfinite=False)
    leaves, treedef = jax.tree.flatten(params)
    for write, carry in zip(writes, carries, strict=True):
        sources = (put(s) if isinstance(s, LazyArray) else s for s in write.sources)
        fresh = convert(write.conversion, carry, *sources)
        leaves[write.slots] = map(place_like, fresh, write.targets)
        _release_host_arrays([write], leaves[write.slots])
    return jax.tree.unflatten(treedef, leaves)


@no_mesh()
def reload_params(
    params: Any,
    loaded: Any,
    *,
    partial: bool = False,
    ignore: str | Sequence[str] = (),
    allow_nonfinite: bool = False,
) -> Any:
    """`update_params` into the buffers of `params`, which is donated: use the tree returned.

    First everything is checked (one pass over `loaded`, one synchronisation); then the leaves are
    written, by a program compiled once for each shape and dtype: one by one, or on a GPU with the
    plugin up to 32 alike together, by one kernel and without further memory. No leaf changes
    shape, dtype, weak type, sharding, committed-ness or address, so a function jitted over the
    tree neither recompiles nor sees buffers move. `loaded` stays alive and unchanged; numpy
    arrays in it may be overwritten as soon as this returns (they are sent to the device twice,
    once to be checked, and waited for one by one; `reload_stream` sends them once).

    An address moves only where keeping it would destroy somebody else's data: where `params` and
    `loaded` share a buffer (that leaf gets a new one), and on CPU where numpy has a live view of
    the buffer or owns it (`np.asarray(leaf)`, `jnp.asarray(numpy_array)`).

    Args:
        params: as in `update_params`, all JAX arrays; consumed.
        loaded: as in `update_params`, on any device.
        partial: as in `update_params`. Leaves that are kept are handed on, not copied.
        ignore: as in `update_params`.
        allow_nonfinite: accept NaN and infinite weights, to look at a model that has diverged.
            Scales are checked all the same. With the plugin this also saves the pass that checks.

    Raises:
        ValueError: as `update_params`, and if two leaves of `params` share a buffer. Nothing has
            been changed then.
        TypeError: as `update_params`, and under a trace (use `update_params` there), or if a leaf
            of `params` is abstract or a numpy array.
        ReloadError: if the device fails after the checks, for example out of memory. It names
            the leaves already new and holds the tree as it is then.
    """
    writes = account(params, loaded, partial=partial, ignore=ignore)
    alike = list(bundles(writes, unchecked=allow_nonfinite))
    carries, flags = _measure(alike)
    # The host prepares what is to be written while the device measures.
    check_donatable(params, writes)
    if any(isinstance(flag, jax.core.Tracer) for _, flag in flags):
        raise TypeError(
            "`reload_params` overwrites buffers and cannot run under jit, vmap or grad, but it was "
            "called while a function is traced. Use `update_params` there."
        )
    todo = [step for some in zip(alike, carries, strict=True) for step in steps(*some)]
    shared = set().union(*map(addresses, jax.tree.leaves(loaded)))
    _check_values(flags, allow_nonfinite=allow_nonfinite)
    leaves, treedef = jax.tree.flatten(params)
    for done, step in enumerate(todo):
        try:
            step.run(leaves, shared)
            _release_host_arrays(step.bundle.writes, [leaves[i] for i in sum(step.slots, ())])
        except Exception as error:
            tree = jax.tree.unflatten(treedef, leaves)
            raise _reload_error(todo, done, tree, error) from error
    return jax.tree.unflatten(treedef, leaves)


def dequantize_params(params: Any) -> Any:
    """The float tree of a served one: what its trainer has, to the precision of FP8.

    Equivalent JAX: `kernel.dequantize()`, float32 `[*stack, K, N]`, for each PaddedKernel. A
    kernel boxed in `nn.Partitioned` gets the box of its qvalue with the last two names swapped; an
    FP8Param of NNX becomes an nnx.Param, its names swapped too.
    Other leaves are handed on as they are, except a static activation scale (`x_scale` beside a
    kernel), which `nn.Dense` does not have and which is left out.

    Raises:
        TypeError, ValueError: if a kernel is not intact (see `PaddedKernel`).
    """
    if isinstance(params, PaddedKernel):
        return _dequantize(params)
    if is_variable(params) and hasattr(type(params), "to_param"):  # jaxfp8.nnx.FP8Param
        return params.to_param()
    if _has_calibration(params):
        rest = {key: value for key, value in params.items() if key != "x_scale"}
        params = rest if isinstance(params, dict) else type(params)(rest)  # FrozenDict, nnx.State
    if jax.tree_util.treedef_is_leaf(jax.tree.structure(params)):
        return params
    children, treedef = one_level(params)
    return treedef.unflatten(map(dequantize_params, children))


def trainable_mask(params: Any) -> Any:
    """True for each leaf that a gradient step may change, for `optax.masked`.

    False for the leaves of a PaddedKernel, for a static activation scale (`x_scale` beside a
    kernel), for NNX Variables that are no nnx.Param, and for what is not a real float of 16 bits or
    more. The tree has the structure of `params`, boxes and PaddedKernels included.
    """
    leaves, treedef = jax.tree.flatten(params)
    mask = [False] * len(leaves)
    tree = entries(params)
    for path, entry in tree.items():
        padded = isinstance(entry.node, PaddedKernel)
        if entry.learns and not (padded or is_calibration(path, tree)):
            mask[entry.slots] = [_is_trainable(leaf) for leaf in leaves[entry.slots]]
    return jax.tree.unflatten(treedef, mask)


# The names of parameters alike, and for each of them whether it is finite and its scales valid.
Flags = list[tuple[tuple[str, ...], Any]]


def _measure(alike: Sequence[Bundle]) -> tuple[list[Carry], Flags]:
    carries, flags = [], []
    for bundle in alike:
        carry, flag = bundle.measure()
        carries.append(carry)
        flags.append((bundle.names, flag))
        _release_host_arrays(bundle.writes, flag)
    return carries, flags


def value_problems(flags: Flags, *, allow_nonfinite: bool) -> list[str]:
    """A line for each parameter whose measured values cannot be served; one synchronisation."""
    concrete = [(names, flag) for names, flag in flags if not isinstance(flag, jax.core.Tracer)]
    values = jax.device_get([flag for _, flag in concrete])
    verdicts = [
        (name, *verdict)
        for (names, _), rows in zip(concrete, values, strict=True)
        for name, verdict in zip(names, rows, strict=True)
    ]
    problems = []
    for name, finite, scales_valid in sorted(verdicts):
        if not (finite or allow_nonfinite):
            problems.append(f"  {name}: a weight is NaN or infinite (in the parameter's dtype).")
        if not scales_valid:
            problems.append(f"  {name}: a scale is not positive, finite and at least 2^-126.")
    return problems


def _check_values(flags: Flags, *, allow_nonfinite: bool) -> None:
    if problems := value_problems(flags, allow_nonfinite=allow_nonfinite):
        raise ValueError(
            "`loaded` holds values that cannot be served, and nothing has been changed. Look for "
            "a diverged training step or a damaged checkpoint (`reload_params` takes NaN and "
            "infinite weights with allow_nonfinite=True, bad scales never):\n" + "\n".join(problems)
        )


def _release_host_arrays(writes: Sequence[Write], made: Any) -> None:
    # On CPU a numpy array is read where it lies, while the program runs; and were the next ones
    # sent meanwhile, all of a checkpoint would be on its way, and in memory, at once.
    if not all(isinstance(source, jax.Array) for write in writes for source in write.sources):
        jax.block_until_ready(made)


def _reload_error(todo: list[Step], done: int, params: Any, error: Exception) -> ReloadError:
    def names(some: Sequence[Step]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for step in some for name in step.bundle.names))

    failed = names(todo[done : done + 1])
    updated = tuple(name for name in names(todo[:done]) if name not in failed)
    rest = tuple(name for name in names(todo[done + 1 :]) if name not in failed)
    return ReloadError(
        f"`reload_params` failed on the device while it wrote {', '.join(failed)}: {error}. "
        "Already new: "
        f"{', '.join(updated) or 'nothing'}. Still old: {', '.join(rest) or 'nothing'}. The "
        "tree as it is now is this error's `params` attribute; the buffers of what failed "
        "may be gone. Free memory and reload again, or build the tree anew with `update_params`.",
        params,
        updated,
        failed,
    )


def _has_calibration(node: Any) -> bool:
    if not (isinstance(node, Mapping) and "x_scale" in node):
        return False
    return isinstance(unbox(node.get("kernel")), PaddedKernel)


def _dequantize(kernel: PaddedKernel) -> Any:
    weight = unbox(kernel).dequantize()
    box = kernel.qvalue
    if not isinstance(box, AxisMetadata):
        return weight
    if isinstance(box, Partitioned) and len(box.names) >= 2:
        box = box.replace(names=(*box.names[:-2], box.names[-1], box.names[-2]))
    return box.replace_boxed(weight)


def _is_trainable(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and leaf.dtype.name in FLOATS
