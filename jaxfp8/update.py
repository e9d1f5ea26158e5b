"""New weights for a served model: pure (`update_params`) or in place (`reload_params`).

Both take the tree that a trainer has, pair it with the served one path by path, check everything
before anything is changed, and rewrite whole buffers: a weight's scale is recomputed with it, and
its padding is zeroed each time.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax.core.meta import AxisMetadata, Partitioned

from jaxfp8._accounting import (
    Write,
    account,
    entries,
    is_calibration,
    is_variable,
    mapping_like,
    one_level,
    unbox,
)
from jaxfp8._buffers import Buffer, addresses, check_unshared
from jaxfp8._bundles import Bundle, OneByOne
from jaxfp8._convert import Carry, convert
from jaxfp8._devices import where_they_lie
from jaxfp8._donate import Step, steps
from jaxfp8._in_flight import InFlight
from jaxfp8._leaf import FLOATS
from jaxfp8._placement import no_mesh, place_like, together
from jaxfp8._plan import plan_reload
from jaxfp8._progress import report
from jaxfp8._reload_error import ReloadError as ReloadError
from jaxfp8._reload_error import reload_error
from jaxfp8._send import arriving
from jaxfp8._values import check_values, measure_all
from jaxfp8.padded import PaddedKernel


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
        Only beside an FP8Weight, from a checkpoint whose activations are then dynamic, its lack is
        an error, unless `partial`.

    Raises:
        ValueError: if paths are missing or unexpected, or shapes, layouts or scales do not fit
            (all are listed in one error); if a weight is NaN or infinite, or a scale not
            positive. Values are checked where they are concrete: under `jit`, `vmap` or
            `eval_shape` the traced ones are not, and `quantize`'s rule holds instead (a slice
            with a NaN gets a NaN scale).
        TypeError: if only dtypes or types do not fit.
    """
    writes = account(params, loaded, partial=partial, ignore=ignore)
    carries, flags = measure_all([Bundle((write,), OneByOne(write.conversion)) for write in writes])
    check_values(flags, allow_nonfinite=False)
    leaves, treedef = jax.tree.flatten(params)
    window = InFlight()
    arrived = arriving((source, None) for write in writes for source in write.sources)
    for write, carry in zip(writes, carries, strict=True):
        size = window.admit(write.sources)
        leaves[write.slots] = _converted(write, carry, arrived)
        window.sent(size, leaves[write.slots])
    window.finish()
    return jax.tree.unflatten(treedef, leaves)


@no_mesh()
def reload_params(
    params: Any,
    loaded: Any,
    *,
    partial: bool = False,
    ignore: str | Sequence[str] = (),
    allow_nonfinite: bool = False,
    progress: bool | Callable[[int, int], None] = False,
) -> Any:
    """`update_params` into the buffers of `params`, which is donated: use the tree returned.

    First everything is checked (one pass over `loaded`, one synchronisation); then the leaves are
    written, by a program compiled once for each shape and dtype: one by one, or on a GPU with the
    plugin up to 32 alike together, by one kernel and without further memory. No leaf changes
    shape, dtype, weak type, sharding, committed-ness or address, so a function jitted over the
    tree neither recompiles nor sees buffers move. `loaded` stays alive and unchanged; numpy
    arrays in it may be overwritten as soon as this returns. They are sent to the device twice, once
    to be checked; `reload_stream` sends them once. Behind the one in hand up to 192 MiB are on
    their way, or the whole next one where it does not go in pieces (from pinned memory, or to a
    mesh), and up to 256 MiB of what has come are still to be read; a stack goes element by element,
    but for shards.

    An address moves only where keeping it would destroy somebody else's data: where `params` and
    `loaded` share a buffer (that leaf gets a new one), and on CPU where numpy has a live view of
    the buffer or owns it (`np.asarray(leaf)`, `jnp.asarray(numpy_array)`).

    Args:
        params: as in `update_params`, all JAX arrays; consumed.
        loaded: as in `update_params`, on any device.
        partial: as in `update_params`. Leaves that are kept are handed on, not copied.
        ignore: as in `update_params`.
        allow_nonfinite: accept NaN and infinite weights, to look at a model that has diverged.
            Scales are checked all the same. With the plugin this also saves the pass that
            checks, and what numpy holds is sent once.
        progress: as in `reload_stream`; the bytes are those of `loaded`, each counted twice: when
            it has been sent to be checked and when it has been sent to be written.

    Raises:
        ValueError: as `update_params`, and if two leaves of `params` share a buffer. Nothing has
            been changed then.
        TypeError: as `update_params`, and under a trace (use `update_params` there), or if a leaf
            of `params` is abstract or a numpy array.
        ReloadError: if the device fails after the checks, for example out of memory. It names
            the leaves already new and holds the tree as it is then.
    """
    patterns = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    alike = plan_reload(
        params, loaded, partial=partial, ignore=patterns, allow_nonfinite=allow_nonfinite
    )
    with report(progress, "reload", 2 * sum(bundle.nbytes for bundle in alike)) as advance:
        carries, flags = measure_all(alike, advance)
        # The host prepares what is to be written while the device measures.
        held = check_unshared(params, (write for bundle in alike for write in bundle.writes))
        if any(isinstance(flag, jax.core.Tracer) for _, flag in flags):
            raise TypeError(
                "`reload_params` overwrites buffers and cannot run under jit, vmap or grad, but it "
                "was called while a function is traced. Use `update_params` there."
            )
        todo = [step for some in zip(alike, carries, strict=True) for step in steps(*some)]
        shared = held.intersection(addresses(*jax.tree.leaves(loaded)))
        check_values(flags, allow_nonfinite=allow_nonfinite)
        return _write(params, todo, shared, advance)


def _converted(write: Write, carry: Carry, arrived: Iterator[jax.Array]) -> Iterable[Any]:
    # In a frame of its own: nothing holds what came from the host when the next is read.
    sources = together(tuple(next(arrived) for _ in write.sources))
    with where_they_lie(sources):
        fresh = convert(write.conversion, carry, *sources)
    return map(place_like, fresh, write.targets)


def _write(
    params: Any, todo: Sequence[Step], shared: set[Buffer], advance: Callable[[int], None]
) -> Any:
    leaves, treedef = jax.tree.flatten(params)
    last = {id(step.bundle): place for place, step in enumerate(todo)}
    window, done, telling = InFlight(), -1, False
    arrived = arriving(pair for step in todo for pair in step.wanted)
    try:
        for done, step in enumerate(todo):
            size = window.admit(step.bundle.coming)
            step.run(leaves, shared, arrived)
            window.sent(size, functools.partial(_at, leaves, sum(step.slots, ())), done)
            if done == last[id(step.bundle)]:
                telling = True
                advance(step.bundle.nbytes)
                telling = False
        window.finish()
    except Exception as error:
        arrived.close()
        if telling:
            with contextlib.suppress(Exception):
                window.finish()
        unsure = {*window.labels} if telling else {*window.labels, done}
        tree = jax.tree.unflatten(treedef, leaves)
        raise reload_error(todo, done + telling, unsure, tree, error) from error
    return jax.tree.unflatten(treedef, leaves)


def _at(leaves: Sequence[Any], slots: Sequence[int]) -> list[Any]:
    return [leaves[i] for i in slots]


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
        params = mapping_like(params, rest)
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
