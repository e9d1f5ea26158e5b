"""A tree that is overwritten leaf by leaf: each is checked, and then written into its buffer."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from jaxfp8._accounting import (
    Entry,
    Path,
    Write,
    entries,
    ignored,
    is_calibration,
    is_quantized,
    path_name,
    split_path,
)
from jaxfp8._buffers import Buffer, addresses, check_unshared, check_writable
from jaxfp8._bundles import Bundle, bundles
from jaxfp8._convert import Conversion, Copy
from jaxfp8._donate import Step, steps
from jaxfp8._elements import abstract_element, at, element_of
from jaxfp8._leaf import check_target
from jaxfp8._placement import element_sharding, no_mesh, source_sharding
from jaxfp8._reload_error import ReloadError
from jaxfp8._rows import Rows
from jaxfp8._send import arriving
from jaxfp8._shards import features_of, plan, plan_rows
from jaxfp8._tally import Part, Tally, declared_shards
from jaxfp8._values import Flags, value_problems


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
        if len(self._names) < len(self._entries):
            (name, _), *_ = collections.Counter(map("/".join, self._entries)).most_common(1)
            raise ValueError(
                f"`params` has two leaves of one path, {name}: a key with '/' in it means the same "
                "as a dict within a dict. Rename one, or use `reload_params`."
            )
        self._leaves, self._treedef = jax.tree.flatten(params)
        self._ignore = ignore
        self._allow_nonfinite = allow_nonfinite

    @property
    def params(self) -> Any:
        """The tree as it is now."""
        return jax.tree.unflatten(self._treedef, self._leaves)

    def part(self, path: str, shard: str | None = None) -> Part:
        """What a path names: a leaf, or one element of a stack."""
        if not isinstance(path, str):
            raise TypeError(
                "`path` must be a str such as 'layers_0/mlp/kernel', but it is a "
                f"{type(path).__name__}."
            )
        literal = any(name == path or name.startswith(f"{path}/") for name in self._names)
        name, index = (path, ()) if literal else split_path(path)
        return Part(name, index, shard)

    @no_mesh()
    def put(self, values: Mapping[Part, Any], on_write: Callable[[int], None]) -> None:
        """Check all values, and then write them; `on_write` is told the bytes of each.

        Raises:
            TypeError, ValueError: if one cannot be written; none has been then.
            ReloadError: if the device failed.
        """
        plans: dict[Part, tuple[Conversion, tuple[Any, ...]]] = {}
        problems: dict[Part, Exception] = {}
        for part, value in values.items():
            if part.name not in self.tally and ignored(tuple(part.name.split("/")), self._ignore):
                continue
            try:
                self.tally.check_new(part)
                plans[part] = self._plan(part, value)
            except (TypeError, ValueError) as error:
                problems[part] = error.with_traceback(None)  # It holds this frame.
        if problems:
            types = all(isinstance(error, TypeError) for error in problems.values())
            lines = [f"  {part}: {error}" for part, error in problems.items()]
            raise (TypeError if types else ValueError)(_refusal(values, lines))
        arrived = arriving(
            pair for part, found in plans.items() for pair in self._wanted(part, *found)
        )
        todo: dict[Part, list[Step]] = {}
        flags: Flags = []
        writes: list[Write] = []
        for part, (conversion, sources) in plans.items():
            there = tuple(next(arrived) for _ in sources)
            bundle = self._bundle(part, conversion, there)
            carry, flag = bundle.measure(iter(there))
            if isinstance(flag, jax.core.Tracer):
                raise TypeError(
                    "a `reload_stream` overwrites buffers and cannot be used under jit, vmap or "
                    "grad, but a value is traced. Use `update_params` there."
                )
            # Here and not after the check: others are on their way.
            todo[part] = steps(bundle, carry)
            flags.append((bundle.names, flag))
            writes += bundle.writes
        if lines := value_problems(flags, allow_nonfinite=self._allow_nonfinite):
            raise ValueError(_refusal(values, lines))
        given = jax.tree.leaves(list(values.values()))
        shared = set(addresses(*given))
        sizes = []
        for part, programs in todo.items():
            self._run(part, programs, shared)
            sizes.append(self.tally.record(part))
            if is_quantized(values[part]):
                self.tally.want_x_scale(part.name)
        if not all(isinstance(leaf, jax.Array) for leaf in given):
            self._release_host_arrays(writes)
        for size in sizes:
            on_write(size)

    def _target(self, part: Part) -> Any:
        """A parameter as it is now, without boxes; of one element the shapes."""
        entry = self._entries[self._names[part.name]]
        whole = jax.tree.unflatten(jax.tree.structure(entry.node), self._leaves[entry.slots])
        return abstract_element(whole, part.index) if part.index else whole

    def _plan(self, part: Part, value: Any) -> tuple[Conversion, tuple[Any, ...]]:
        target = self._target(part)
        if part.shard is not None:
            start, stop = self.tally.rows(part.name, part.shard)
            return plan_rows(target, stop - start, value)
        is_scale = is_calibration(self._names[part.name], self._entries)
        return plan(target, value, is_scale=is_scale)

    def _wanted(
        self, part: Part, conversion: Conversion, sources: tuple[Any, ...]
    ) -> Iterator[tuple[Any, Sharding | None]]:
        """What a part is made from, and where it lies: there once, to be measured and written."""
        target, *_ = self._leaves[self._entries[self._names[part.name]].slots]
        leading = len(part.index)
        where, ndim = element_sharding(target.sharding, leading), target.ndim - leading
        for source in sources:
            if isinstance(source, jax.core.Tracer):
                yield source, None
            else:
                turned = conversion.transposes
                yield source, source_sharding(source, where, ndim, transposes=turned)

    def _bundle(self, part: Part, conversion: Conversion, sources: tuple[Any, ...]) -> Bundle:
        """The write of a part from what is there."""
        slots = self._entries[self._names[part.name]].slots
        write = Write(str(part), tuple(self._leaves[slots]), slots, conversion, sources)
        if part.shard is None:
            (bundle,) = bundles([write], unchecked=self._allow_nonfinite)
        else:
            start, stop = self.tally.rows(part.name, part.shard)
            rows = Rows(conversion, stop - start, features_of(self._target(part)))
            bundle = Bundle((write,), rows, at((start,)))
        return element_of(bundle, part.index) if part.index else bundle

    def _run(self, part: Part, programs: list[Step], shared: set[Buffer]) -> None:
        for step in programs:
            try:
                step.run(self._leaves, shared, arriving(step.wanted))
            except Exception as error:
                what = f"failed on the device while it wrote {part}: {error}"
                raise self.stopped(what, part) from error

    def _release_host_arrays(self, writes: Iterable[Write]) -> None:
        # They have been sent once the copies on the device are ready. A CPU has no copies: it reads
        # the host's memory while the program runs.
        for write in writes:
            jax.block_until_ready(write.sources)
            for leaf in self._leaves[write.slots]:
                if any(device.platform == "cpu" for device in leaf.devices()):
                    leaf.block_until_ready()

    def stopped(self, why: str, failed: Part | None = None) -> ReloadError:
        """The error that says what is new and what is old, and holds the tree as it is."""
        if failed is not None:
            slots = self._entries[self._names[failed.name]].slots
            if any(leaf.is_deleted() for leaf in self._leaves[slots]):
                failed = Part(failed.name)  # The other elements and shards were in its buffers.
        updated = tuple(str(part) for part in self.tally.updated() if not part.within(failed))
        old = tuple(str(part) for part in self.tally.old() if not part.within(failed))
        message = (
            f"this reload_stream {why}. Already new: {', '.join(updated) or 'nothing'}. Still old: "
            f"{', '.join(old) or 'nothing'}. The tree as it is now is this error's `params` "
            "attribute (and the stream's): do not serve it, reload it whole or open another "
            "`reload_stream` on it and put what is old."
        )
        if failed is not None:
            message += f" The buffers of {failed} may be gone: build that layer anew then."
        return ReloadError(message, self.params, updated, () if failed is None else (str(failed),))


def _refusal(values: Mapping[Part, Any], lines: list[str]) -> str:
    what = "this leaf" if len(values) == 1 else f"these {len(values)} leaves"
    return f"`put` was refused, and nothing of {what} has been changed:\n" + "\n".join(lines)


def _check_params(params: Any, tree: Mapping[Path, Entry]) -> None:
    problems: dict[str, Exception] = {}
    writes = []
    for path, entry in tree.items():
        try:
            check_target(entry.node)
        except (TypeError, ValueError) as error:
            problems[path_name(path)] = error.with_traceback(None)
        arrays = tuple(jax.tree.leaves(entry.node))
        writes.append(Write(path_name(path), arrays, entry.slots, Copy(np.dtype(np.float32)), ()))
    if problems:
        types = all(isinstance(error, TypeError) for error in problems.values())
        raise (TypeError if types else ValueError)(
            "`params` cannot be reloaded, and nothing has been changed:\n"
            + "\n".join(f"  {name}: {error}" for name, error in problems.items())
        )
    check_writable(writes)
    check_unshared(params, writes)
