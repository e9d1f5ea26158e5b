"""What is raised when a reload stops half way, and what it says of the tree."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax

from jaxfp8._donate import Step


class ReloadError(RuntimeError):
    """A reload that stopped half way: a device error after the checks, or a stream left early.

    Attributes:
        params: the tree as it is now: new leaves where they were written, else the old ones.
        updated: the paths already new; of a stack that came in elements, `path[i]`.
        failed: the paths whose write failed; their buffers may be lost. Several where one program
            writes them (on a GPU, up to 32 of one shape) or more were on their way from the host;
            none where a stream was left.
    """

    def __init__(
        self, message: str, params: Any, updated: tuple[str, ...], failed: tuple[str, ...]
    ):
        super().__init__(message)
        self.params = params
        self.updated = updated
        self.failed = failed


def reload_error(
    todo: Sequence[Step], done: int, unsure: set[int], params: Any, error: Exception
) -> ReloadError:
    """The error after `done` steps; those `unsure` were on their way, or `progress` failed."""

    def names(some: Iterable[int]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for i in some for name in todo[i].bundle.names))

    leaves = jax.tree.leaves(params)
    # The elements of a stack share its buffers.
    lost = {i for i, step in enumerate(todo) for j in sum(step.slots, ()) if leaves[j].is_deleted()}
    failed = names(sorted(unsure | lost))
    updated = tuple(name for name in names(range(done)) if name not in failed)
    rest = tuple(name for name in names(range(done, len(todo))) if name not in failed)
    what = f"failed on the device while it wrote {', '.join(failed)}"
    return ReloadError(
        f"`reload_params` {what if failed else 'was stopped by `progress`'}: {error}. Already new: "
        f"{', '.join(updated) or 'nothing'}. Still old: {', '.join(rest) or 'nothing'}. The "
        "tree as it is now is this error's `params` attribute; the buffers of what failed "
        "may be gone. Free memory and reload again, or build the tree anew with `update_params`.",
        params,
        updated,
        failed,
    )
