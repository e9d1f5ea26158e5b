"""The same benchmark under other XLA flags for command buffers, which XLA runs as CUDA graphs.

XLA reads its flags once in a process, so each setting is a child. What XLA_FLAGS holds already
stays in front.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import _report


# An empty list of commands disables them. By default a graph has at least five commands.
SETTINGS = {
    "default": "",
    "disabled": "--xla_gpu_enable_command_buffer=",
    "from one command": "--xla_gpu_graph_min_graph_size=1",
}


def in_child(benchmark: str, flags: str, arguments: Sequence[str]) -> dict[str, Any] | None:
    """What `python -m benchmarks BENCHMARK ARGUMENTS` writes under these flags too.

    None, and a line, if the child wrote nothing: XLA ends a process that gives it a flag which it
    does not know.
    """
    before = os.environ.get("XLA_FLAGS", "")
    environment = {**os.environ, "XLA_FLAGS": f"{before} {flags}".strip()}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks", benchmark, "--out", folder, *arguments]
        done = subprocess.run(
            command, cwd=_report.ROOT, env=environment, stdout=subprocess.DEVNULL, check=False
        )
        for path in Path(folder).glob("*.json"):
            return json.loads(path.read_text()) | {"exit_code": done.returncode}
    _report.Progress.say(f"    XLA_FLAGS={flags!r} failed: exit code {done.returncode}")
    return None


def captured(share: float | None, marks: dict[str, float] | None, in_program: int) -> str:
    """Whether graphs launch the kernels, in a word, from what the profile and the program say.

    Args:
        share: of the kernels, those that a graph launched in the profile; None without one.
        marks: of the host, a call; see `_trace.MARKS`.
        in_program: command buffers in the program's text.
    """
    if share:
        return f"{share:.0%}"
    if marks and marks["not used in a profile"]:
        return "not in profiles"
    if in_program:
        return "in the program"
    return "-" if share is None else "no"
