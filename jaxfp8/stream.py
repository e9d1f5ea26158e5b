"""New weights for a served model as they come: leaf by leaf or layer by layer, in any order."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxfp8._accounting import entries
from jaxfp8._in_place import InPlace
from jaxfp8._progress import report
from jaxfp8._tally import Part
from jaxfp8.update import ReloadError


class _State(enum.Enum):
    NOT_ENTERED = "has not been entered: write `with reload_stream(params) as stream:`"
    OPEN = "is open"
    FINISHED = "is finished, and its tree was returned: open another `reload_stream` on that"
    LEFT = "was left: open another `reload_stream` on its `params`, the tree as it is now"
    FAILED = "failed on the device: see the ReloadError, whose `params` is the tree as it is now"


def reload_stream(
    params: Any,
    *,
    ignore: str | Sequence[str] = (),
    allow_nonfinite: bool = False,
    shards: Mapping[str, Mapping[str, int]] | None = None,
    progress: bool | Callable[[int, int], None] = False,
) -> ReloadStream:
    """`reload_params` for weights that come one after another, in any order, without a second copy.

    Each leaf is checked (path, shape, dtype, values) and then written into its buffer at once: the
    rule of `reload_params`, that all is checked before anything is changed, holds for a leaf here
    (for a subtree in `put_tree`), and not for the tree, because that would want a second copy of
    the model. A leaf that fails its check is not changed, and the stream stays usable.

        with reload_stream(params) as stream:
            stream.put("layers_0/mlp/kernel", w)
            stream.put_tree("layers_1", {"mlp": {"kernel": ...}})
            stream.put_tree("scanned[2]", {"mlp": {"kernel": ...}})  # layer 2 under `nn.scan`
            params = stream.finish()

    The tree is complete when `finish` says so. A block that is left before that, by an exception
    or not, raises `ReloadError` once something has been written: it names what is new and what is
    old, and holds the tree as it is then. An exception that comes before anything was written
    passes as it is, as do KeyboardInterrupt and SystemExit, with that state as a note.

    A weight is sent to the device once. A `put` returns when it has been sent and checked, so its
    host array may be overwritten; it is written while the next is on its way. Beside the model the
    device holds what one `put` brought, and the one before it as long as its write takes. Programs,
    buffers, shardings and addresses: as in `reload_params`.

    Args:
        params: as in `reload_params`; consumed leaf by leaf. A function that reads the old tree
            gets JAX's error of a deleted buffer from the first write on.
        ignore: as in `update_params`: patterns of paths that `params` lacks, to be left out.
        allow_nonfinite: as in `reload_params`.
        shards: which parameters are fused, and of what rows: from a pattern (`fnmatch`) of the
            layer's path to the sizes of its shards in their order, such as
            `{"*/qkv": {"q": 4096, "k": 1024, "v": 1024}}`.
        progress: True shows a bar on standard error (rich's, in the extra `progress`, else lines);
            a callable gets the bytes written and those of the whole tree after each leaf.

    Raises:
        TypeError: if a leaf of `params` is no JAX array, or traced (use `update_params` there).
        ValueError: if one is deleted, or two share a buffer; or if `shards` does not fit.
    """
    return ReloadStream(
        params,
        (ignore,) if isinstance(ignore, str) else tuple(ignore),
        allow_nonfinite,
        shards or {},
        progress,
    )


class ReloadStream:
    """What `reload_stream` returns; see there."""

    def __init__(
        self,
        params: Any,
        ignore: tuple[str, ...],
        allow_nonfinite: bool,
        shards: Mapping[str, Mapping[str, int]],
        progress: bool | Callable[[int, int], None],
    ):
        self._tree = InPlace(params, ignore, allow_nonfinite, shards)
        self._progress = progress
        self._advance: Callable[[int], None] = lambda amount: None
        self._bar = contextlib.ExitStack()
        self._state = _State.NOT_ENTERED

    @property
    def params(self) -> Any:
        """The tree as it is now: new leaves where they were written, else the old ones."""
        return self._tree.params

    @property
    def updated(self) -> tuple[str, ...]:
        """The paths already new, in the order of their writes.

        Of a leaf that is new in part its elements and shards: `path[3]`, `path[q]`, `path[3][q]`.
        """
        return tuple(map(str, self._tree.tally.updated()))

    @property
    def missing(self) -> tuple[str, ...]:
        """The paths that `finish` still wants; of a leaf written in part what is left of it."""
        return tuple(map(str, self._tree.tally.missing()))

    def __enter__(self) -> ReloadStream:
        if self._state is not _State.NOT_ENTERED:
            raise RuntimeError(f"this stream cannot be entered: it {self._state.value}.")
        self._state = _State.OPEN
        told = report(self._progress, "reload", self._tree.tally.total_bytes)
        self._advance = self._bar.enter_context(told)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._bar.close()
        if self._state is not _State.OPEN:
            return
        self._state = _State.LEFT
        why = "was left before `finish`"
        if error is not None:
            why += f" by {type(error).__name__}: {str(error).rstrip('.')}"
        if error is None:
            raise self._tree.stopped(why)
        if not self._tree.tally.updated():
            return
        if isinstance(error, Exception):
            raise self._tree.stopped(why) from error
        error.add_note(str(self._tree.stopped(why)))

    def put(self, path: str, value: Any, *, shard: str | None = None) -> None:
        """Check one leaf and write it.

        Args:
            path: where in the tree, such as `"layers_0/mlp/kernel"`; with `[i]` behind it one
                element of a stack along its leading axes, such as layer 3 of those under `nn.scan`
                in `"layers/mlp/kernel[3]"`. Then `value` is of that element, without those axes,
                and the others keep their bits.
            value: what `update_params` takes for that leaf, on the host or on any device; with
                `shard` that for a leaf of the shard's rows: of a kernel float `[*stack, K, n]`, a
                DenseWeight, an FP8Weight (either layout) or a PaddedKernel; else `[..., n]`.
            shard: which rows of a fused parameter, by their name in `shards`. The other rows keep
                their bits.

        Raises:
            ValueError, TypeError: if the path is unknown, or was already written, or the value
                does not fit or is not finite. The leaf has not been changed, and the stream is
                usable.
            RuntimeError: if the stream is not open.
            ReloadError: if the device failed while the leaf was written; the stream is closed.
        """
        self._check_open("put")
        found = entries(value)
        if list(found) != [()]:
            raise TypeError(
                f"`put` takes one leaf, but the value for {path} is a {type(value).__name__} of "
                f"{len(found)} leaves. Use `put_tree({path!r}, ...)` for a subtree."
            )
        self._put({self._tree.part(path, shard): found[()].node})

    def put_tree(self, path: str, tree: Any) -> None:
        """Check the leaves of a subtree, all of them, and then write them; `""` is the root.

        With `[i]` behind `path`, element i of every leaf: `put_tree("layers[3]", layer)`. It need
        not be complete. Faults of several leaves are listed in one error.

        Raises:
            As `put`; if one leaf fails its check, none has been changed.
        """
        self._check_open("put_tree")
        found, above = entries(tree), self._tree.part(path)
        head = (above.name,) if above.name else ()
        values = {
            Part("/".join((*head, *sub)), above.index): entry.node for sub, entry in found.items()
        }
        if len(values) < len(found):
            raise ValueError(
                "`tree` has two leaves of one path: a key with '/' in it means the same as a dict "
                "within a dict. Use one form."
            )
        self._put(values)

    def put_all(self, pairs: Iterable[tuple[str, Any]]) -> None:
        """`put(*pair)` for each pair of a path and a value, as an iterator gives them.

        A triple names a shard.

        Raises:
            TypeError: if an item is no such pair.
            As `put`: the items before have been written, that one has not, and the rest are not
            asked for.
        """
        for item in pairs:
            if not (isinstance(item, tuple) and len(item) in (2, 3) and isinstance(item[0], str)):
                raise TypeError(
                    "`pairs` must give tuples (path, value) or (path, value, shard), but one is "
                    f"a {type(item).__name__}. From a dict take `.items()`."
                )
            self.put(item[0], item[1], shard=item[2] if len(item) == 3 else None)

    def finish(self, *, partial: bool = False) -> Any:
        """The tree, once all of it is new; the stream is closed then.

        Args:
            partial: allow leaves that were not written; they are handed on with their old values.
                A static activation scale (`x_scale` beside a kernel) may be left out all the same,
                unless that kernel came as an FP8Weight.

        Raises:
            ValueError: if leaves are missing; all are named, and the stream stays open for them.
            RuntimeError: if the stream is not open.
        """
        self._check_open("finish")
        missing = self.missing
        if missing and not partial:
            raise ValueError(
                f"the stream is not complete, and {len(missing)} leaves still hold their old "
                f"values: {', '.join(missing)}. Put them, or keep their old values with "
                "finish(partial=True)."
            )
        self._state = _State.FINISHED
        return self.params

    def _put(self, values: Mapping[Part, Any]) -> None:
        try:
            self._tree.put(values, self._advance)
        except ReloadError:
            self._state = _State.FAILED
            raise

    def _check_open(self, method: str) -> None:
        if self._state is not _State.OPEN:
            raise RuntimeError(f"`{method}` was called, but this stream {self._state.value}.")
