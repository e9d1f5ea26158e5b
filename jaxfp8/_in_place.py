"""A tree that is overwritten leaf by leaf: each is checked, and then written into its buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jaxfp8._accounting import Entry, Path, Write, entries, ignored, is_calibration, path_name
from jaxfp8._bundles import Bundle, bundles
from jaxfp8._convert import Carry, Conversion, Copy
from jaxfp8._donate import Buffer, Step, addresses, check_donatable, steps
from jaxfp8._leaf import check_target
from jaxfp8._placement import bring, no_mesh, source_sharding
from jaxfp8._rows import Rows
from jaxfp8._shards import features_of, plan, plan_rows
from jaxfp8._tally import Tally, declared_shards, shown
from jaxfp8.update import ReloadError, value_problems


class InPlace:
    """The arrays of a tree, and what of it is new.

    Attributes:
        tally: which leaves have been written.
    """

    def __init__(self, params: Any, ignore: tuple[str, ...], allow_nonfinite: bool, shards: Any):
        self._entries = entries(params)
        _check_params(params, self._entries)
        self.tally = Tally(self._entries, declared_shards(shards, self._entries))
        self._names = {"/".join(path): path for path in self._entries}
        self._leaves, self._treedef = jax.tree.flatten(params)
        self._ignore = ignore
        self._allow_nonfinite = allow_nonfinite

    @property
    def params(self) -> Any:
        """The tree as it is now."""
        return jax.tree.unflatten(self._treedef, self._leaves)

    @no_mesh()
    def put(
        self, values: Mapping[str, Any], shard: str | None, on_write: Callable[[int], None]
    ) -> None:
        """Check all values, and then write them; `on_write` is told the bytes of each.

        Raises:
            TypeError, ValueError: if one cannot be written; none has been then.
            ReloadError: if the device failed.
        """
        plans: dict[str, tuple[Conversion, tuple[Any, ...]]] = {}
        problems: dict[str, Exception] = {}
        for name, value in values.items():
            if name not in self._names and ignored(tuple(name.split("/")), self._ignore):
                continue
            try:
                self.tally.check_new(name, shard)
                plans[name] = self._plan(name, value, shard)
            except (TypeError, ValueError) as error:
                problems[name] = error
        if problems:
            types = all(isinstance(error, TypeError) for error in problems.values())
            lines = [f"  {shown(name, shard)}: {error}" for name, error in problems.items()]
            raise (TypeError if types else ValueError)(_refusal(values, lines))
        writes = {name: self._send(name, shard, *found) for name, found in plans.items()}
        alike = {name: self._bundle(name, write, shard) for name, write in writes.items()}
        measured = {name: bundle.measure() for name, bundle in alike.items()}
        flags = [(alike[name].names, flags) for name, (_, flags) in measured.items()]
        if any(isinstance(flag, jax.core.Tracer) for _, flag in flags):
            raise TypeError(
                "a `reload_stream` overwrites buffers and cannot be used under jit, vmap or grad, "
                "but a value is traced. Use `update_params` there."
            )
        if lines := value_problems(flags, allow_nonfinite=self._allow_nonfinite):
            raise ValueError(_refusal(values, lines))
        todo = {
            name: self._steps(name, bundle, measured[name][0], shard)
            for name, bundle in alike.items()
        }
        shared = set().union(*map(addresses, jax.tree.leaves(values)))
        sizes = []
        for name, parts in todo.items():
            self._run(parts, shared)
            sizes.append(self.tally.record(name, shard))
        if not all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(values)):
            self._release_host_arrays(writes.values())
        for size in sizes:
            on_write(size)

    def _target(self, name: str) -> Any:
        """A parameter as it is now, without boxes."""
        entry = self._entries[self._names[name]]
        return jax.tree.unflatten(jax.tree.structure(entry.node), self._leaves[entry.slots])

    def _plan(self, name: str, value: Any, shard: str | None) -> tuple[Conversion, tuple[Any, ...]]:
        if shard is not None:
            start, stop = self.tally.rows(name, shard)
            return plan_rows(self._target(name), stop - start, value)
        is_scale = is_calibration(self._names[name], self._entries)
        return plan(self._target(name), value, is_scale=is_scale)

    def _send(
        self, name: str, shard: str | None, conversion: Conversion, sources: tuple[Any, ...]
    ) -> Write:
        """Bring what a parameter is made from to where it lies: once, for check and write."""
        slots = self._entries[self._names[name]].slots
        targets = tuple(self._leaves[slots])
        where, ndim, turned = targets[0].sharding, targets[0].ndim, conversion.transposes
        sources = tuple(
            s
            if isinstance(s, jax.core.Tracer)
            else bring(s, source_sharding(s, where, ndim, transposes=turned))
            for s in sources
        )
        return Write(shown(name, shard), targets, slots, conversion, sources)

    def _bundle(self, name: str, write: Write, shard: str | None) -> Bundle:
        if shard is None:
            (bundle,) = bundles([write], unchecked=self._allow_nonfinite)
            return bundle
        start, stop = self.tally.rows(name, shard)
        features = features_of(self._target(name))
        return Bundle((write,), Rows(write.conversion, stop - start, features))

    def _steps(self, name: str, bundle: Bundle, carry: Carry, shard: str | None) -> list[Step]:
        if shard is not None:
            start, _ = self.tally.rows(name, shard)
            carry = (jax.device_put(np.int32(start)), *carry)
        return steps(bundle, carry)

    def _run(self, parts: list[Step], shared: set[Buffer]) -> None:
        for step in parts:
            try:
                step.run(self._leaves, shared)
            except Exception as error:
                (name,) = step.bundle.names
                what = f"failed on the device while it wrote {name}: {error}"
                raise self.stopped(what, name) from error

    def _release_host_arrays(self, writes: Iterable[Write]) -> None:
        # They have been sent once the copies on the device are ready. A CPU has no copies: it reads
        # the host's memory while the program runs.
        for write in writes:
            jax.block_until_ready(write.sources)
            for leaf in self._leaves[write.slots]:
                if any(device.platform == "cpu" for device in leaf.devices()):
                    leaf.block_until_ready()

    def stopped(self, why: str, failed: str = "") -> ReloadError:
        """The error that says what is new and what is old, and holds the tree as it is."""
        updated = self.tally.updated()
        old = [name for name in self.tally.old() if name != failed]
        message = (
            f"this reload_stream {why}. Already new: {', '.join(updated) or 'nothing'}. Still old: "
            f"{', '.join(old) or 'nothing'}. The tree as it is now is this error's `params` "
            "attribute (and the stream's): do not serve it, reload it whole or open another "
            "`reload_stream` on it and put what is old."
        )
        if failed:
            message += f" The buffers of {failed} may be gone: build that layer anew then."
        return ReloadError(message, self.params, updated, (failed,) if failed else ())


def _refusal(values: Mapping[str, Any], lines: list[str]) -> str:
    what = "this leaf" if len(values) == 1 else f"these {len(values)} leaves"
    return f"`put` was refused, and nothing of {what} has been changed:\n" + "\n".join(lines)


def _check_params(params: Any, tree: Mapping[Path, Entry]) -> None:
    problems: dict[str, Exception] = {}
    writes = []
    for path, entry in tree.items():
        try:
            check_target(entry.node)
        except (TypeError, ValueError) as error:
            problems[path_name(path)] = error
        arrays = tuple(jax.tree.leaves(entry.node))
        writes.append(Write(path_name(path), arrays, entry.slots, Copy(np.dtype(np.float32)), ()))
    if problems:
        types = all(isinstance(error, TypeError) for error in problems.values())
        raise (TypeError if types else ValueError)(
            "`params` cannot be reloaded, and nothing has been changed:\n"
            + "\n".join(f"  {name}: {error}" for name, error in problems.items())
        )
    check_donatable(params, writes)
