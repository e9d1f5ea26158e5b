"""What tests share: four CPU devices, hypothesis without deadlines, GPU tests only on GPUs."""

from __future__ import annotations

import os
from collections.abc import Sequence

import hypothesis
import jax
import pytest


# For tests of sharded trees; must be set before the first array is made.
jax.config.update("jax_num_cpu_devices", 4)

# The first example of a property compiles, and a compilation has no deadline.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")

_deselected: list[pytest.Item] = []


def cuda_devices() -> int:
    """How many CUDA devices JAX sees."""
    try:
        return len(jax.devices("cuda"))
    except RuntimeError:
        return 0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests marked `gpu` where there are too few: not run, and not called skipped."""
    there = cuda_devices()

    def wanted(item: pytest.Item) -> int:
        marker = item.get_closest_marker("gpu")
        return 0 if marker is None else marker.kwargs.get("count", 1)

    _deselected.extend(item for item in items if wanted(item) > there)
    items[:] = [item for item in items if wanted(item) <= there]
    if _deselected:
        config.hook.pytest_deselected(items=_deselected)


def pytest_report_header() -> Sequence[str]:
    """The versions a report of a failure needs."""
    return [f"jax {jax.__version__}"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was not run, and why."""
    if _deselected:
        terminalreporter.write_line(
            f"{len(_deselected)} tests marked `gpu` were not run: JAX sees {cuda_devices()} CUDA "
            "devices here."
        )
