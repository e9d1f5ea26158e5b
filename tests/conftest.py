"""What tests share: four CPU devices, hypothesis without deadlines, GPU tests only on GPUs."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import hypothesis
import jax
import pytest

from jaxfp8 import _plan


# The benchmarks are run from a checkout, not installed. Behind all else, so that jaxfp8 is found
# where it is installed.
sys.path.append(str(Path(__file__).parents[1]))

# For tests of sharded trees; must be set before the first array is made.
jax.config.update("jax_num_cpu_devices", 4)

# The first example of a property compiles, and a compilation has no deadline.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")

# Bytes of a process from which on compiled programs are given back between the modules. With
# what malloc then keeps they were 6 GB after two fifths of the tests in one process.
_MEMORY_LIMIT = 2 << 30


@pytest.fixture(scope="module", autouse=True)
def _memory_goes_back():
    yield
    statistics = Path("/proc/self/statm")
    if not statistics.exists():
        return
    resident = int(statistics.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if resident > _MEMORY_LIMIT:
        jax.clear_caches()
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it.
        if trim is not None:
            trim(0)


@pytest.fixture
def no_plans():
    """Reloads take no program from a plan, nor leave theirs in one."""
    _plan._plans.clear()
    yield
    _plan._plans.clear()


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
