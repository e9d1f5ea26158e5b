"""Whether this machine has a GPU that the kernels run on."""

from __future__ import annotations

import jax

from benchmarks import _report
from jaxfp8._cutlass import problem


def is_measured() -> bool:
    """True on a Hopper GPU with the plugin; elsewhere False, and a line that says why."""
    why_not = problem()
    if why_not is not None:
        print(_report.NO_GPU if jax.default_backend() == "cpu" else why_not)
    return why_not is None
